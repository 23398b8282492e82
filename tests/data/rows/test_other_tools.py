"""Files in the shapes of tools without a layout of their own: read right, or refused with what would read them."""

import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import Feedback, Preference, Rejection, read_as

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "Q?"), ("assistant", "A."), ("assistant", "B.")))
S = {"role": "system", "content": "S"}
PARTS = [{"type": "text", "text": "Q?"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
THUMBS = {"👍": True, "👎": False}


def read(rows, **settings):
    places = [(f"a.jsonl:{i}", row) for i, row in enumerate(rows, start=1)]
    return list(read_as(iter(places), DataConfig(**settings)).records)


def said(record):
    """Prompt and completion with its label; of a pair, both completions; of any other record, its reason."""
    if isinstance(record, Preference):
        return record.chosen.prompt, record.chosen.completion, record.rejected.completion
    if isinstance(record, Feedback):
        return record.prompt, record.completion, record.desirable
    return record.reason


# ---------------------------------------------------------------------------------------------------- forms of messages

VERCEL = [
    {"id": "1", "role": "user", "parts": PARTS},
    {"id": "2", "role": "assistant", "content": "", "parts": [{"type": "step-start"}, {"type": "text", "text": "A."}]},
]
ANTHROPIC = [
    {"role": "user", "content": PARTS},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "12"}]}],
    },
]
RESPONSES = [
    {"role": "user", "content": [{"type": "input_text", "text": "Q?"}]},
    {"type": "function_call", "call_id": "t", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "t", "output": "12"},
]
GEMINI = [
    {"role": "user", "parts": [{"text": "Q?"}]},
    {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"a": 1}}}]},
    {"role": "function", "parts": [{"functionResponse": {"name": "f", "response": 12}}]},
]


def called(content, **own):
    return {"role": "assistant", "content": content, "tool_calls": [{**own, **CALL}]}


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ({"model": "m", "system": "S", "messages": [Q]}, [S, Q]),
        ({"system": [{"text": "S"}], "messages": [{"role": "user", "content": [{"text": "Q?"}]}]}, [S, Q]),  # Bedrock
        (ANTHROPIC, [Q, called("I look.", id="t"), {"role": "tool", "content": "12", "tool_call_id": "t"}]),
        ({"instructions": "S", "input": "Q?"}, [S, Q]),
        (
            {"instructions": "S", "input": RESPONSES},
            [S, Q, called("", id="t"), {"role": "tool", "content": "12", "tool_call_id": "t"}],
        ),
        ({"contents": GEMINI[:1], "systemInstruction": {"parts": [{"text": "S"}]}}, [S, Q]),
        (GEMINI, [Q, called(""), {"role": "tool", "content": "12", "name": "f"}]),
        (VERCEL[:1], [Q]),
        ("\n\nHuman: Q?\n\nAssistant: A.\n\nHuman: Q?\n\nAssistant:", [Q, A, Q]),
    ],
)
def test_a_prompt_is_read_from_the_requests_of_other_interfaces(prompt, turns):
    from kto_jax.data.rows.turns import message_of

    (record,) = read([{"prompt": prompt, "completion": "A.", "label": True}])
    assert [message_of(message) for message in record.prompt] == turns


THOUGHT = {"role": "assistant", "content": "A.", "reasoning_content": "T"}


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ({"choices": [{"index": 0, "message": A, "finish_reason": "stop"}]}, "A."),
        ({"type": "message", "role": "assistant", "content": [{"type": "text", "text": "A."}]}, "A."),
        ([{"type": "text", "text": "A."}], "A."),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "A."}]},
            THOUGHT,
        ),
        (
            {
                "output": [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "T"}]},
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A."}]},
                ]
            },
            THOUGHT,
        ),
        (
            {"candidates": [{"content": {"role": "model", "parts": [{"text": "T", "thought": True}, {"text": "A."}]}}]},
            THOUGHT,
        ),
        (
            [{"role": "assistant", "parts": [{"type": "reasoning", "text": "T"}, {"type": "text", "text": "A."}]}],
            THOUGHT,
        ),
    ],
)
def test_a_completion_is_read_from_the_answers_of_other_interfaces(completion, message):
    (record,) = read([{"prompt": "Q?", "completion": completion, "label": True}])
    assert record.completion == message


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "A."}, {"type": "thinking", "thinking": "T"}]}],
            "type 'thinking'",
        ),
        ([{"role": "assistant", "parts": [{"type": "file", "url": "x"}]}], "type 'file', not 'text'"),
        ({"choices": [{"message": A}, {"message": B}]}, "an object with 'choices'"),
        ({"output": [{"type": "reasoning", "summary": []}, {"type": "web_search_call"}]}, "role of the completion"),
    ],
)
def test_what_no_template_can_show_is_rejected_by_name(completion, reason):
    (record,) = read([{"prompt": "Q?", "completion": completion, "label": True}])
    assert isinstance(record, Rejection) and reason in record.reason


def test_tools_that_a_request_offers_are_never_dropped():
    prompt = {"messages": [Q], "tools": [{"name": "f"}]}
    (record,) = read([{"prompt": prompt, "completion": "A.", "label": True}])
    assert record.reason.endswith(
        "config.data.prompt_field='prompt.messages' with config.data.tools_field='prompt.tools' reads it"
    )
    row = {"id": "t", "traceId": "t", "input": prompt, "output": A, "scores": {"thumb": [1]}}
    (record,) = read([row])
    assert [message["role"] for message in record.prompt] == ["tools", "user"]


def test_conversations_of_other_interfaces_are_demonstrations():
    gemini = [GEMINI[0], {"role": "model", "parts": [{"text": "A."}]}]
    rows = [{"systemInstruction": {"parts": [{"text": "S"}]}, "contents": gemini}]
    assert [said(record) for record in read(rows, format="demonstrations")] == [([S, Q], "A.", True)]
    assert [said(record) for record in read([{"messages": VERCEL}], format="demonstrations")] == [([Q], "A.", True)]


def test_a_system_text_beside_messages_is_read_or_named_in_a_warning(capsys):
    rows = [{"system": [{"type": "text", "text": "S"}], "messages": [Q, A], "label": True}]
    assert said(read(rows)[0]) == ([Q], "A.", True)
    assert "data.system_field='system' puts it before the prompt" in capsys.readouterr().err
    assert said(read(rows, system_field="system")[0]) == ([S, Q], "A.", True)


# ---------------------------------------------------------------------------------------------------- feedback of tools

LABEL_STUDIO = {
    "id": 1,
    "data": {"prompt": "Q?", "response": "A."},
    "annotations": [{"result": [{"from_name": "thumb", "type": "choices", "value": {"choices": ["good"]}}]}],
}
WEAVE = {
    "op_name": "chat",
    "inputs": {"model": "m", "messages": [Q]},
    "output": {"choices": [{"message": A}]},
    "summary": {"weave": {"feedback": [{"payload": {"emoji": "👎"}}]}},
}


@pytest.mark.parametrize(
    ("row", "settings", "label_map", "desirable"),
    [
        (
            LABEL_STUDIO,
            {
                "prompt_field": "data.prompt",
                "completion_field": "data.response",
                "label_field": "annotations.0.result.0.value.choices",
            },
            {"good": True, "bad": False},
            True,
        ),
        (
            WEAVE,
            {
                "prompt_field": "inputs",
                "completion_field": "output",
                "label_field": "summary.weave.feedback.0.payload.emoji",
            },
            THUMBS,
            False,
        ),
        (
            {"prompt": "Q?", "text": "A.", "answer": "reject", "_input_hash": 1},  # Prodigy
            {"completion_field": "text", "label_field": "answer"},
            {"accept": True, "reject": False},
            False,
        ),
        (
            {"id": 1, "prompt": "Q?", "text": "A.", "label": ["good"]},  # Doccano
            {"completion_field": "text"},
            {"good": True, "bad": False},
            True,
        ),
        (
            {"question": "Q?", "answer": "A.", "thumb": "up", "__lilac__": {"signal": 1}},  # Lilac
            {"prompt_field": "question", "completion_field": "answer", "label_field": "thumb"},
            {"up": True, "down": False},
            True,
        ),
        (
            {"Ticket ID": "7", "Customer message": "Q?", "Agent reply": "A.", "CSAT": "Bad"},  # Zendesk
            {"prompt_field": "Customer message", "completion_field": "Agent reply", "label_field": "CSAT"},
            {"Good": True, "Bad": False},
            False,
        ),
    ],
    ids=["label_studio", "weave", "prodigy", "doccano", "lilac", "zendesk"],
)
def test_rows_of_tools_are_refused_with_the_settings_that_read_them(row, settings, label_map, desirable):
    with pytest.raises(ConfigError) as error:
        read([row])
    for name, path in settings.items():
        assert f"config.data.{name}={path!r}" in str(error.value)
    assert f'set --config.data.label_map="{label_map}"' in str(error.value)
    (record,) = read([row], **settings, label_map=label_map)
    assert record.completion == "A." and record.prompt in ("Q?", [Q]) and record.desirable == desirable


@pytest.mark.parametrize(
    ("row", "format", "hint"),
    [
        ({"id": "f", "run_id": "r", "key": "thumb", "score": 1}, "thumbs", "join them by 'run_id'"),  # LangSmith
        ({"text": "Once upon a time."}, "demonstrations", "A text alone does not say where its completion begins"),
        (
            {"type": "message", "user": "U1", "text": "A.", "reactions": [{"name": "+1", "count": 2}]},
            "thumbs",
            "docs/data.md",
        ),
        (
            {"prompt": "Q?", "response": "A.", "helpfulness": 3, "correctness": 4},  # HelpSteer
            "scores",
            "config.data.completion_field='response' with config.data.score_field='helpfulness' reads it",
        ),
    ],
    ids=["langsmith_feedback", "text", "slack", "helpsteer"],
)
def test_rows_that_cannot_be_read_as_they_are_say_why(row, format, hint):
    with pytest.raises(ConfigError) as error:
        read([row], format=format)
    assert hint in str(error.value)


def test_messages_of_librechat_one_a_row_are_put_together():
    message = {"conversationId": "c", "parentMessageId": "m1", "isCreatedByUser": False}
    rows = [
        {**message, "messageId": "m2", "text": "A.", "feedback": {"rating": "thumbsDown"}},
        {**message, "messageId": "m1", "parentMessageId": "0", "isCreatedByUser": True, "text": "Q?"},
        {**message, "messageId": "m3", "text": "B."},
        {**message, "conversationId": "d", "messageId": "m2", "text": "C.", "feedback": {"rating": "thumbsUp"}},
    ]
    records = read(rows)
    assert [said(record) for record in records] == [([Q], "A.", False), "an answer without a rating", "empty prompt"]
    assert [record.place for record in records] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]


# ---------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"winner": "model_b", "conversation_a": [Q, A], "conversation_b": [Q, B]}, {}, ([Q], "B.", "A.")),
        ({"winner": "tie (bothbad)", "conversation_a": [Q, A], "conversation_b": [Q, B]}, {}, "a tie"),
        (
            {
                **{"prompt": '["Q?", "R?"]', "response_a": '["A.", "C."]', "response_b": '["A.", "D."]'},
                **{"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
            },
            {},
            ([Q, A, {"role": "user", "content": "R?"}], "D.", "C."),
        ),
        (
            {"prompt": "Q?", "response_0": "A.", "response_1": "B.", "better_response_id": 1, "safer_response_id": 0},
            {"label_field": "safer_response_id"},
            ("Q?", "A.", "B."),
        ),
        ({"prompt": "Q?", "response_1": "A.", "response_2": "B.", "preference_strength": 2}, {}, ("Q?", "B.", "A.")),
        ({"context": [Q], "response1": "A.", "response2": "B.", "overall_preference": -1}, {}, ([Q], "A.", "B.")),
        (
            {"question": {"full_text": "Q?"}, "answer_0": "A.", "answer_1": "B.", "score_0": -0.5, "score_1": 0.5},
            {},
            ("Q?", "B.", "A."),
        ),
        (
            {"question": "Q?", "answer_0": "A.", "answer_1": "B.", "score_0": 10**400, "score_1": float("nan")},
            {"layout": "compared"},
            "no column says which of 'answer_0' and 'answer_1' is better; data.label_field names one column",
        ),
        (
            {"instruction": "Q?", "output_1": "A.", "output_2": "B.", "preference": "right"},
            {"label_map": {"left": True, "right": False}, "layout": "compared"},
            ("Q?", "B.", "A."),
        ),
        (
            {"instruction": "Q?", "output_1": "A.", "output_2": "B.", "preference": "right"},
            {"layout": "compared"},
            "preference is 'right', which names none of 'output_1' and 'output_2'; data.label_map={'right': True} says "
            "that the first is better, and None that it is a tie",
        ),
        (
            {
                "prompt": "\n\nHuman: Q?\n\nAssistant: ",
                "answers": [{"answer": "B.", "rank": 2}, {"answer": "A.", "rank": 1}],
            },
            {},
            ([Q], "A.", "B."),
        ),
        ({"prompt": "Q?", "responses": ["A.", "B."], "scores": [0.1, 0.7]}, {}, ("Q?", "B.", "A.")),
        (
            {"prompt": "Q?", "responses": ["A.", "B."], "scores": [0.1, 0.1]},
            {},
            "a completion of the same rank as another",
        ),
    ],
)
def test_a_comparison_gives_the_better_and_the_worse_completion(row, settings, expected):
    (record,) = read([row], format="pairs", **settings)
    assert said(record) == expected


def test_completions_with_scores_are_examples_by_themselves():
    completions = [
        {"model": "one", "response": "A.", "overall_score": 8.5, "fine-grained_score": 4},
        {"model": "two", "response": "B.", "overall_score": None, "fine-grained_score": 3},
    ]
    row = {"source": "x", "instruction": "Q?", "completions": completions}
    records = read([row], format="scores")
    assert (records[0].prompt, records[0].completion, records[0].score) == ("Q?", "A.", 8.5)
    assert records[1].reason == "a completion without a score"
    found = read([row], format="scores", score_field="fine-grained_score")
    assert [record.score for record in found] == [4, 3]
