"""Exports of feedback from chat programs and observers of models, in the shapes that these write."""

import json

import pytest

from kto_jax.config import DataConfig
from kto_jax.data.rows.logged import messages_of, with_thoughts
from kto_jax.data.rows.records import Feedback, Rejection, Skipped, read_as

USER = {"role": "user", "content": "Q?"}


def read(rows, layout="auto", **settings):
    places = [(f"a:{i}", row) for i, row in enumerate(rows, start=1)]
    found = read_as(iter(places), DataConfig(layout=layout, **settings))
    return found.layout, list(found.records)


def said(records):
    """Prompt, completion and label of each record; its reason if it has one."""
    return [
        (record.prompt, record.completion, record.desirable) if isinstance(record, Feedback) else record.reason
        for record in records
    ]


# ----------------------------------------------------------------------------------------------------------- Open WebUI


def webui(rating, *messages, key="a1", chat=None, **fields):
    history = {message["id"]: message for message in messages}
    snapshot = {"chat": {"id": "c", "chat": {"history": {"messages": history, "currentId": key}, **(chat or {})}}}
    data = {"rating": rating, "details": {"rating": 3}}
    return {"id": "f", "type": "rating", "data": data, "meta": {"message_id": key}, "snapshot": snapshot, **fields}


def turn(key, parent, role, content, **fields):
    return {"id": key, "parentId": parent, "role": role, "content": content, **fields}


TURNS = (turn("q1", None, "user", "Q?"), turn("a1", "q1", "assistant", "A."))


def test_open_webui_gives_the_rated_message_behind_its_own_path():
    branch = [
        *TURNS,
        turn("a2", "q1", "assistant", "B."),
        turn("q2", "a2", "user", "R?"),
        turn("a3", "q2", "assistant", "C."),
    ]
    rows = [
        webui(1, *branch),
        webui("-1", *branch, key="a3"),
        webui(1, *TURNS, chat={"params": {"system": "Be brief."}}),
        webui(None, *TURNS),
        webui(1, *TURNS, type="comment"),
        webui(1, *TURNS, key="lost"),
        webui(1, turn("q1", None, "user", "Q?", files=[{"type": "image"}]), TURNS[1]),
    ]
    layout, records = read(rows)
    assert layout == "open_webui"
    assert said(records) == [
        ([USER], "A.", True),
        ([USER, {"role": "assistant", "content": "B."}, {"role": "user", "content": "R?"}], "C.", False),
        ([{"role": "system", "content": "Be brief."}, USER], "A.", True),
        "an answer without a rating",
        "feedback of type 'comment'",
        "the snapshot has no message meta.message_id",
        "a message has files, which the export does not hold",
    ]
    assert [record.score for record in read(rows[:1], format="scores")[1]] == [3.0]


def test_thoughts_that_open_webui_displays_are_thoughts_and_displayed_calls_are_rejected():
    shown = (
        '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds</summary>\n'
        "&gt; Is 1 &lt; 2?\n&gt; Yes.\n</details>\nA."
    )
    (_, (record,)) = read([webui(1, TURNS[0], turn("a1", "q1", "assistant", shown))])
    assert record.completion == {"role": "assistant", "content": "A.", "reasoning_content": "Is 1 < 2?\nYes."}
    called = '<details type="tool_calls" done="true" name="f">\n<summary>Done</summary>\n</details>\nA.'
    (_, (record,)) = read([webui(1, TURNS[0], turn("a1", "q1", "assistant", called))])
    assert record.reason == "the answer displays 'tool_calls', which is not what the model wrote"
    assert with_thoughts({"role": "user", "content": shown})["content"] == shown


# ------------------------------------------------------------------------------------------------------------ LibreChat


def libre(key, parent, is_user, text="", **fields):
    return {"messageId": key, "parentMessageId": parent, "isCreatedByUser": is_user, "text": text, **fields}


@pytest.mark.parametrize("nested", [False, True])
def test_librechat_gives_rated_answers_behind_their_path_flat_or_nested(nested):
    thought = [{"type": "think", "think": "Hm."}, {"type": "text", "text": {"value": "B."}}]
    turns = [
        libre("q1", "0000", True, "Q?"),
        libre("a1", "q1", False, "A.", feedback={"rating": "thumbsDown"}),
        libre("a2", "q1", False, content=thought, feedback={"rating": "thumbsUp"}),
        libre("q2", "a1", True, "R?"),
        libre("a3", "q2", False, "C.", feedback=None),
    ]
    if nested:
        children = {"q1": ["a1", "a2"], "a1": ["q2"], "q2": ["a3"]}
        by_key = {message["messageId"]: message for message in turns}
        for parent, keys in children.items():
            by_key[parent]["children"] = [by_key[key] for key in keys]
        turns = turns[:1]
    layout, records = read([{"conversationId": "c", "messages": turns}])
    assert layout == "librechat"
    told = {"role": "assistant", "content": "B.", "reasoning_content": "Hm."}
    assert said(records) == [([USER], "A.", False), ([USER], told, True), "an answer without a rating"]


def test_a_tool_call_that_librechat_keeps_as_a_part_is_rejected_by_name():
    parts = [{"type": "tool_call", "tool_call": {"name": "f"}}, {"type": "text", "text": "A."}]
    answer = libre("a1", "q1", False, content=parts, feedback={"rating": "thumbsUp"})
    (_, (record,)) = read([{"messages": [libre("q1", None, True, "Q?"), answer]}])
    assert record.reason == "part of the completion has type 'tool_call', not 'text'"


# ---------------------------------------------------------------------------------------------------------- AnythingLLM


def test_anythingllm_is_read_from_json_and_csv_with_its_words_for_thumbs(tmp_path):
    from kto_jax.data.rows.records import read_records

    lines = ["id,username,workspace,prompt,response,sent_at,rating"]
    lines += [f'{i},ada,help,"Q, {i}?",A.,2026-01-02,{rating}' for i, rating in enumerate(("GOOD", "BAD", "--"))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = said(read_records(str(tmp_path / "a.csv"), DataConfig()))
    assert found == [("Q, 0?", "A.", True), ("Q, 1?", "A.", False), "its label is mapped to None"]
    row = {"id": 1, "prompt": "Q?", "response": "A.", "sent_at": "x", "rating": "GOOD", "attachments": []}
    image = row | {"attachments": [{"type": "image"}]}
    layout, records = read([row, image])
    assert layout == "anythingllm"
    assert said(records) == [("Q?", "A.", True), "the chat has attachments, which are not text"]


# -------------------------------------------------------------------------------------------------- Langfuse, LangSmith


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        ([{"name": "thumb", "value": 1}], {}, True),
        ([{"name": "thumb", "value": None, "stringValue": "bad"}], {"label_map": {"bad": False}}, False),
        ({"thumb": [0]}, {}, False),
        ('[{"name": "thumb", "value": 1}]', {}, True),
        ([{"name": "a", "value": 1}, {"name": "b", "value": 0}], {"label_field": "b"}, False),
        (
            [{"name": "a", "value": 1}, {"name": "b", "value": 0}],
            {},
            "several ratings, 'a', 'b': data.label_field names one",
        ),
        ([{"name": "a", "value": 1}, {"name": "a", "value": 0}], {}, "ratings that disagree"),
        ([{"name": "a", "value": 1}], {"label_field": "b"}, "an answer without a rating"),
        ([], {}, "an answer without a rating"),
        (None, {}, "an answer without a rating"),
        ([{"name": "a", "value": 0.7}], {}, "label is not mapped: '0.7'; config.data.format='scores' reads numbers"),
    ],
)
def test_langfuse_gives_the_named_or_only_score(scores, settings, expected):
    row = {
        "id": "t",
        "projectId": "p",
        "input": [USER],
        "output": {"role": "assistant", "content": "A."},
        "scores": scores,
    }
    layout, records = read([row], **settings)
    assert layout == "langfuse"
    assert said(records) == [([USER], "A.", expected) if isinstance(expected, bool) else expected]


def test_a_score_of_langfuse_may_be_a_column_of_its_own():
    row = {"traceId": "t", "input": "Q?", "output": "A.", "user-feedback": [1]}
    assert said(read([row], label_field="user-feedback")[1]) == [("Q?", "A.", True)]


def test_langsmith_gives_runs_with_their_feedback():
    run = {
        "id": "r",
        "inputs": {"messages": [USER]},
        "outputs": {"choices": [{"message": {"role": "assistant", "content": "A."}}]},
    }
    rows = [
        run | {"feedback_stats": {"thumb": {"n": 2, "avg": 1.0}}},
        run | {"feedback": [{"key": "thumb", "score": 0}]},
        run | {"feedback_stats": {"thumb": {"n": 0, "avg": None}}},
        run | {"feedback_stats": None, "outputs": None},
        {**run, "outputs": {"a": 1, "b": 2}, "feedback": [{"key": "thumb", "score": 1}]},
    ]
    layout, records = read(rows)
    assert layout == "langsmith"
    assert said(records) == [
        ([USER], "A.", True),
        ([USER], "A.", False),
        "an answer without a rating",
        "an answer without a rating",
        "outputs holds neither text nor messages; data.layout='fields' reads a dotted path into it",
    ]
    assert said(read(rows[:1], format="demonstrations")[1]) == [([USER], "A.", True)]
    assert [record.score for record in read(rows[:1], format="scores")[1]] == [1.0]


LANGCHAIN = {
    "lc": 1,
    "type": "constructor",
    "id": ["langchain", "schema", "messages", "HumanMessage"],
    "kwargs": {"content": "Q?"},
}
CALL = {"type": "ai", "content": "", "tool_calls": [{"name": "f", "args": {"a": 1}, "id": "1"}]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Q?", "Q?"),
        ({"question": "Q?"}, "Q?"),
        ({"anything": "Q?"}, "Q?"),
        ({"a": "Q?", "b": "R?"}, None),
        ({}, None),
        ("", None),
        (None, None),
        ([], None),
        ([3], None),
        (json.dumps([USER]), [USER]),
        ("{not json", "{not json"),
        ({"messages": [[LANGCHAIN]]}, [USER]),
        ({"messages": [{"type": "human", "data": {"content": "Q?"}}]}, [USER]),
        ({"input": {"messages": [{"type": "human", "content": "Q?"}]}}, [USER]),
        (
            {"generations": [[{"text": "A.", "message": {"type": "ai", "data": {"content": "A."}}}]]},
            [{"role": "assistant", "content": "A."}],
        ),
        ({"generations": [[{"text": "A."}]]}, "A."),
        (CALL, [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "name": "f", "arguments": {"a": 1}}]}]),
        ({"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": "deep"}}}}}}}}}, None),
    ],
)
def test_messages_are_found_in_what_programs_log(value, expected):
    assert messages_of(value) == expected


# -------------------------------------------------------------------------------------------------------------- Argilla


def test_argilla_gives_submitted_responses_of_both_versions():
    submitted, draft = ({"value": value, "status": status} for value, status in (("1", "submitted"), ("0", "draft")))
    fields = {"fields": {"prompt": "Q?", "response": "A."}}
    rows = [
        fields | {"responses": {"good": [submitted, draft]}},
        fields | {"responses": [{"status": "submitted", "values": {"good": {"value": 0}}}]},
        fields | {"responses": {"good": [submitted, {"value": "0", "status": "submitted"}]}},
        fields | {"responses": {"good": [draft]}},
        fields | {"responses": {"good": [submitted], "kind": [submitted]}},
        {"fields": {"prompt": "Q?", "text": "A."}, "responses": {"good": [submitted]}},
    ]
    layout, records = read(rows)
    assert layout == "argilla"
    assert said(records) == [
        ("Q?", "A.", True),
        ("Q?", "A.", False),
        "ratings that disagree",
        "an answer without a rating",
        "several ratings, 'good', 'kind': data.label_field names one",
        "0 fields for the completion among 'prompt', 'text': data.completion_field names one",
    ]
    flat = {
        "instruction": "Q?",
        "output": "A.",
        "rate.responses": ["1", "0"],
        "rate.responses.status": ["submitted", "draft"],
    }
    assert said(read([flat], layout="argilla")[1]) == [("Q?", "A.", True)]
    first = {"prompt": "Q?", "answer": "A.", "rate": [{"user_id": "u", "value": 1, "status": "submitted"}]}
    assert said(read([first], layout="argilla", label_field="rate")[1]) == [("Q?", "A.", True)]


# ------------------------------------------------------------------------------------------------------ OASST, TRL, SFT


def oasst(key, role, text, *replies, rank=None, **fields):
    return {"message_id": key, "role": role, "text": text, "rank": rank, "replies": list(replies), **fields}


def test_a_tree_of_open_assistant_gives_pairs_of_neighbours_and_counts_the_rest():
    later = oasst(
        "q2", "prompter", "R?", oasst("b0", "assistant", "Yes.", rank=0), oasst("b1", "assistant", "No.", rank=1)
    )
    root = oasst(
        *("q", "prompter", "Q?"),
        oasst("a0", "assistant", "Best.", later, rank=0),
        oasst("a1", "assistant", "Worse.", rank=1),
        oasst("a2", "assistant", "As bad.", rank=1),
        oasst("a3", "assistant", "Unranked.", oasst("q3", "prompter", "S?", oasst("c", "assistant", "C.", rank=0))),
        oasst("a4", "assistant", "Deleted.", rank=2, deleted=True),
    )
    layout, records = read([{"message_tree_id": "q", "prompt": root}], format="pairs")
    assert layout == "oasst_trees"
    pairs = [record for record in records if not isinstance(record, Skipped)]
    assert [(pair.chosen.prompt, pair.chosen.completion, pair.rejected.completion) for pair in pairs] == [
        ([USER], "Best.", "Worse."),
        ([USER, {"role": "assistant", "content": "Best."}, {"role": "user", "content": "R?"}], "Yes.", "No."),
    ]
    assert sorted(record.reason for record in records if isinstance(record, Skipped)) == [
        "a deleted reply",
        "a reply of the same rank as another",
        "a reply without a rank",
        "the only ranked reply to its message",
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("Q?\nYes.", "Q?\nNo.", ("Q?", "\nYes.", "\nNo.")),
        ("Yes.", "No.", None),
    ],
)
def test_two_texts_of_trl_share_a_prompt_up_to_the_first_word_that_differs(chosen, rejected, expected):
    (_, (record,)) = read([{"chosen": chosen, "rejected": rejected}], layout="trl", format="pairs")
    if expected is None:
        assert isinstance(record, Rejection)
    else:
        assert (record.chosen.prompt, record.chosen.completion, record.rejected.completion) == expected


TALK = [
    {"role": "assistant", "content": "Hi."},
    USER,
    {"role": "assistant", "content": "A."},
    USER,
    {"role": "assistant", "content": "B."},
]


@pytest.mark.parametrize(
    ("layout", "name"),
    [("messages", "messages"), ("openai", "messages"), ("trl", "messages"), ("sharegpt", "conversations")],
)
def test_a_conversation_for_sft_is_read_turn_by_turn_or_at_its_last_turn(layout, name):
    _, records = read([{name: TALK}], layout=layout, format="demonstrations")
    assert said(records) == [
        "a turn of the assistant's before any of the user's",
        (TALK[:3][:2], "A.", True),
        (TALK[:4], "B.", True),
    ]
    _, records = read([{name: TALK}], layout=layout, format="demonstrations", assistant_turns="last")
    assert said(records) == [(TALK[:4], "B.", True)]
    _, (record,) = read([{name: TALK[1:2]}], layout=layout, format="demonstrations")
    assert record.reason == "no message is the assistant's"


def test_a_turn_of_weight_0_is_only_context():
    turns = [*TALK[1:2], TALK[2] | {"weight": 0}, *TALK[3:]]
    _, records = read([{"messages": turns}], format="demonstrations")
    assert said(records) == ["a turn of weight 0", (TALK[1:4], "B.", True)]


# --------------------------------------------------------------------------------------------- settings of every layout


def test_fields_may_be_dotted_paths():
    row = {"ask": {"q": "Q?"}, "votes": [{"thumb": 1}], "a.b": "A.", "meta": {"w": 2}}
    settings = {
        "prompt_field": "ask.q",
        "completion_field": "a.b",
        "label_field": "votes.0.thumb",
        "weight_field": "meta.w",
    }
    _, (record,) = read([row], label_map={"1": True}, **settings)
    assert record == Feedback("Q?", "A.", True, 2.0, "a:1")


def test_role_names_are_mapped_in_every_layout():
    roles = {"customer": "user", "bot": "assistant", "human": "system"}
    said_by = [{"role": "customer", "content": "Q?"}, {"role": "bot", "content": "A."}]
    _, (record,) = read([{"messages": said_by, "label": True}], roles=roles)
    assert (record.prompt, record.completion) == ([USER], "A.")
    _, (record,) = read([{"prompt": said_by[:1], "completion": said_by[1:], "label": True}], roles=roles)
    assert (record.prompt, record.completion) == ([USER], "A.")
    turns = [{"from": "human", "value": "S"}, {"from": "customer", "value": "Q?"}, {"from": "bot", "value": "A."}]
    _, (record,) = read([{"conversations": turns, "label": True}], roles=roles)
    assert record.prompt == [{"role": "system", "content": "S"}, USER]


def test_a_system_message_of_a_field_comes_first_and_never_beside_another():
    row = {"prompt": "Q?", "completion": "A.", "label": True}
    rows = [
        row | {"sys": "S"},
        row | {"sys": None},
        row | {"sys": "S", "prompt": [{"role": "system", "content": "T"}, USER]},
    ]
    _, (first, second, third) = read(rows, system_field="sys")
    assert first.prompt == [{"role": "system", "content": "S"}, USER] and second.prompt == "Q?"
    assert third.reason == "the prompt has a system message beside the field 'sys'"


def test_any_of_several_fields_may_hold_the_label_and_they_must_agree():
    row = {"prompt": "Q?", "completion": "A."}
    rows = [
        row | {"a": True, "b": None},
        row | {"b": False},
        row | {"a": True, "b": True},
        row | {"a": True, "b": False},
        row,
    ]
    _, records = read(rows, label_field=("a", "b"))
    assert [label if isinstance(label, str) else label[2] for label in said(records)] == [
        *(True, False, True),
        "the labels in 'a' and 'b' disagree",
        "missing field 'a' or 'b'",
    ]


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
def test_rows_with_images_are_rejected_by_name(name):
    row = {"prompt": "Q?", "completion": "A.", "label": True}
    _, records = read([row | {name: []}, row | {name: ["cat.png"]}])
    assert said(records) == [("Q?", "A.", True), f"{name!r} is not text; only text is trained on"]
