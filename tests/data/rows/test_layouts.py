"""Every layout, on rows as their makers write them; and pairs whose prompt is inside their completions."""

import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.layouts import LAYOUTS
from kto_jax.data.rows.records import Feedback, Preference, Rejection, Skipped, read_records

HH = (
    "\n\nHuman: What are some cuss words in english?\n\nAssistant: Here's an incomplete list.\n\nHuman: What's your "
    "favorite one?\n\nAssistant:"
)
HH_PROMPT = [
    {"role": "user", "content": "What are some cuss words in english?"},
    {"role": "assistant", "content": "Here's an incomplete list."},
    {"role": "user", "content": "What's your favorite one?"},
]


def read(path, *rows, **fields):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_records(str(path), DataConfig(**fields)))


def pair(prompt, chosen, rejected, place, weight=1.0):
    return Preference(Feedback(prompt, chosen, True, weight, place), Feedback(prompt, rejected, False, weight, place))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


NO_TRANSCRIPT = (
    "is not a transcript of Human and Assistant; data.layout='trl' takes what both texts begin with as the prompt"
)


@pytest.mark.parametrize("layout", ["hh", "fields"])
def test_two_transcripts_are_parted_before_their_last_turn(tmp_path, layout):
    path = tmp_path / "hh.jsonl"
    row = {"chosen": f"{HH} I haven't even thought about it.", "rejected": f"{HH} Ask me\n\nlater: no. "}
    records = read(path, row, {**row, "weight": 2}, format="pairs", layout=layout)
    expected = (HH_PROMPT, "I haven't even thought about it.", "Ask me\n\nlater: no.")
    assert records == [pair(*expected, f"{path}:1"), pair(*expected, f"{path}:2", 2.0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": f"{HH} "}, "empty chosen"),
        ({"rejected": f"{HH} No."}, "chosen and rejected are the same"),
        ({"rejected": "No."}, f"no prompt, and rejected {NO_TRANSCRIPT}"),
        ({"chosen": f"So.{HH} No."}, f"no prompt, and chosen {NO_TRANSCRIPT}"),
        ({"rejected": "\n\nHuman: Else?\n\nAssistant: No."}, "chosen and rejected part before their last message"),
        ({"rejected": f"{HH} Yes.\n\nHuman: Why?"}, "rejected has role 'user', not 'assistant'"),
        ({"chosen": "\n\nAssistant: A", "rejected": "\n\nAssistant: B"}, "empty prompt"),
        ({"chosen": None}, "null field 'chosen'"),
        ({"chosen": f"{HH} a\0"}, "NUL character in chosen"),
    ],
)
def test_transcripts_that_are_no_pair_are_rejected(tmp_path, change, reason):
    good = {"chosen": f"{HH} No.", "rejected": f"{HH} Yes."}
    path = tmp_path / "hh.jsonl"
    first, bad, last = read(path, good, {**good, **change}, good, format="pairs", layout="hh")
    assert bad == Rejection(reason, f"{path}:2")
    assert isinstance(first, Preference) and isinstance(last, Preference)


CHAT = [{"role": "system", "content": "Be kind."}, user("Hello?"), assistant("Hi. And?"), user("Bye.")]


@pytest.mark.parametrize("prompt", [{}, {"prompt": ""}, {"prompt": None}, {"prompt": []}, {"prompt": CHAT}])
def test_conversations_with_common_leading_turns_are_parted_before_their_last(tmp_path, prompt):
    row = {**prompt, "chosen": [*CHAT, assistant("See you.")], "rejected": [*CHAT, assistant("Go.")]}
    assert read(tmp_path / "a.jsonl", row, format="pairs") == [
        pair(CHAT, "See you.", "Go.", f"{tmp_path / 'a.jsonl'}:1")
    ]


@pytest.mark.parametrize(
    ("prompt", "head", "expected"),
    [
        ("Hello?", [user("Hello?")], "Hello?"),
        (" Hello?\n", [user("Hello?")], " Hello?\n"),
        ("Hello?", CHAT, CHAT),
        ("Bye.", CHAT, CHAT),
        ([user("Hello?")], [user("Hello?")], [user("Hello?")]),
        (CHAT[:2], CHAT[1:2], CHAT[:2]),
        (CHAT[3:], CHAT, CHAT),
        ("Hello?", [], "Hello?"),
    ],
)
def test_a_prompt_that_is_repeated_in_its_completions_is_read_once(tmp_path, prompt, head, expected):
    row = {"prompt": prompt, "chosen": [*head, assistant("Good.")], "rejected": [*head, assistant("Bad.")]}
    path = tmp_path / "a.jsonl"
    assert read(path, row, {**row, "rejected": "Bad."}, format="pairs") == [
        pair(expected, "Good.", "Bad.", f"{path}:{number}") for number in (1, 2)
    ]
    row = {"prompt": prompt, "completion": row["chosen"], "label": False}
    assert read(path, row) == [Feedback(expected, "Good.", False, 1.0, f"{path}:1")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Other?"}, "chosen is not one message"),
        ({"prompt": "And?"}, "chosen is not one message"),
        ({"prompt": [user("Other?")]}, "chosen is not one message"),
        ({"rejected": [user("Bye."), assistant("Go.")]}, "chosen and rejected part before their last message"),
        ({"prompt": "Bye.", "rejected": [user("Bye."), assistant("Go.")]}, "chosen and rejected part before their"),
        ({"chosen": [assistant("See you.")], "rejected": [assistant("Go.")]}, "empty prompt"),
        ({"chosen": CHAT}, "chosen has role 'user', not 'assistant'"),
        ({"chosen": [*CHAT[:3], assistant("A")], "rejected": [*CHAT[:3], assistant("B")]}, "prompt ends with an ass"),
        ({"chosen": [*CHAT[:1], assistant("A")], "rejected": [*CHAT[:1], assistant("B")]}, "prompt has no message a"),
        ({"prompt": 3}, "prompt is not text but a number"),
        ({"prompt": {}}, "prompt is not text but an empty object"),
        ({"chosen": []}, "empty chosen"),
        ({"chosen": [*CHAT, {"role": ["x"], "content": "A"}]}, "role of the chosen is not known: \"['x']\""),
    ],
)
def test_conversations_that_are_not_of_one_prompt_are_rejected(tmp_path, row, reason):
    good = {"chosen": [*CHAT, assistant("See you.")], "rejected": [*CHAT, assistant("Go.")]}
    (bad,) = read(tmp_path / "a.jsonl", {**good, **row}, format="pairs")
    assert isinstance(bad, Rejection) and bad.reason.startswith(reason)


def test_a_configured_prompt_field_must_be_in_the_file(tmp_path):
    row = {"promt": "Q", "chosen": f"{HH} No.", "rejected": f"{HH} Yes."}
    with pytest.raises(ConfigError, match=r"no column 'question'.*Set config.data.prompt_field"):
        read(tmp_path / "a.jsonl", row, format="pairs", prompt_field="question")


LOG = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        user("Hello?"),
        assistant("Hi.", feedback=True),
        user("More."),
        assistant("No."),
        user("Please."),
        assistant("Fine.", feedback=False, weight=3),
    ],
    "weight": 2,
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_each_rated_turn_of_a_chat_log_is_an_example_with_all_turns_before_it(tmp_path, name):
    path = tmp_path / name
    unrated = {"messages": [user("Hello?"), assistant("Hi.")], "weight": None}
    plain = [{key: message[key] for key in ("role", "content")} for message in LOG["messages"]]
    assert read(path, LOG, unrated, layout="messages") == [
        Feedback(plain[:2], "Hi.", True, 2.0, f"{path}:1"),
        Feedback(plain[:6], "Fine.", False, 3.0, f"{path}:1"),
        Skipped("no message has feedback", f"{path}:2"),
    ]


def test_weights_may_have_another_name_in_every_layout(tmp_path):
    log = {"messages": [user("Q"), assistant("A", feedback=True, trust=2), assistant("B")], "weight": 5, "trust": 3}
    turn = {"messages": [user("Q"), assistant("A", feedback=False, weight=7)], "trust": 3}
    records = read(tmp_path / "a.jsonl", log, turn, layout="messages", weight_field="trust")
    assert [record.weight for record in records] == [2.0, 3.0]
    tree = [{**row, "trust": number, "weight": None} for number, row in enumerate(TREE)]
    pairs = read(tmp_path / "a.jsonl", *tree, layout="oasst", format="pairs", weight_field="trust")
    assert [record.chosen.weight for record in pairs if isinstance(record, Preference)] == [1.0, 3.0, 9.0]


def test_ratings_of_a_chat_log_are_mapped_and_a_bad_one_costs_only_its_turn(tmp_path):
    turns = [user("Q"), *(assistant("A", feedback=rating) for rating in ("up", "down", "else", "none", {"x": 1}))]
    rows = [{"messages": [turns[0], turn]} for turn in turns[1:]]
    both = {"messages": [*rows[2]["messages"], *rows[0]["messages"]]}
    named = {"messages": [user("Q"), assistant("A", thumb="down")]}
    label_map = {"up": True, "down": False, "none": None}
    records = read(
        tmp_path / "a.jsonl", *rows, both, named, layout="messages", label_map=label_map, label_field="thumb"
    )
    found = [r.desirable if isinstance(r, Feedback) else r.reason for r in records]
    unmapped = "label is not mapped: 'else'; --config.data.label_map=\"{'else': True}\" would make it desirable"
    wrong = "label is not a boolean, text or number but an object with 'x'"
    assert found == [True, False, unmapped, "its label is mapped to None", wrong, unmapped, True, False]
    assert [int(r.place.rpartition(":")[2]) for r in records] == [1, 2, 3, 4, 5, 6, 6, 7]


def test_scores_of_a_chat_log_are_numbers(tmp_path):
    log = {"messages": [user("Q"), assistant("A", feedback=4), user("R"), assistant("B", score="high")]}
    first, second = read(tmp_path / "a.jsonl", log, format="scores", layout="messages")
    assert (first.completion, first.score) == ("A", 4.0)
    assert second.reason == "score is not a finite number: 'high'"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "messages is not a list but text"),
        (["text"], "message 1 is not an object but text"),
        ([{"role": "user", "content": "Q", "feedback": True}], "feedback on message 1, which is not the assistant's"),
        ([assistant("A", feedback=True)], "empty prompt"),
        ([assistant("A"), assistant("B", feedback=True)], "prompt ends with an assistant message"),
        ([user("Q"), assistant(None, feedback=True)], "completion is not text but null"),
        ([user("Q"), assistant(" ", feedback=True)], "empty completion"),
        ([user(""), assistant("A", feedback=True)], "empty prompt"),
        ([user("Q"), assistant([assistant("A")], feedback=True)], "part of the completion has type None, not 'text'"),
        (None, "null field 'messages'"),
    ],
)
def test_a_chat_log_that_cannot_be_used_is_rejected(tmp_path, messages, reason):
    path = tmp_path / "a.jsonl"
    assert read(path, {"messages": messages}, layout="messages") == [Rejection(reason, f"{path}:1")]


PROMPT = [user("What is KTO?")]
HALOS = {
    "sample": {
        "type": "sample",
        "prompt": PROMPT,
        "output": "A loss.",
        "prompt_id": 0,
        "sample_id": 0,
        "split": "train",
    },
    "binary": {
        "type": "binary_feedback",
        "prompt": PROMPT,
        "output": [assistant("A loss.")],
        "label": 1,
        "reward": 0.5,
    },
    "pairwise": {
        **{"type": "pairwise_feedback", "prompt": PROMPT, "output_A": [assistant("A.")], "output_B": [assistant("B.")]},
        **{"label": 1, "reward_A": 1.0, "reward_B": 0.5, "reward_difference": 0.5, "prompt_id": 0},
    },
    "scalar": {"type": "scalar_feedback", "prompt": PROMPT, "output": [assistant("A loss.")], "reward": -0.25},
}


def test_the_four_shapes_of_halos_are_read(tmp_path):
    path = tmp_path / "a.json"

    def read_shape(name, format, **change):
        path.write_text(json.dumps([HALOS[name], {**HALOS[name], **change}]))
        return list(read_records(str(path), DataConfig(format=format, layout="halos")))

    places = [f"{path}:1", f"{path}:2"]
    first, second = read_shape("sample", "demonstrations", output="More.")
    assert first == Feedback(PROMPT, "A loss.", True, 1.0, places[0]) and second.completion == "More."
    assert read_shape("binary", "thumbs", label=0) == [
        Feedback(PROMPT, "A loss.", True, 1.0, places[0]),
        Feedback(PROMPT, "A loss.", False, 1.0, places[1]),
    ]
    assert read_shape("pairwise", "pairs", label=0) == [
        pair(PROMPT, "A.", "B.", places[0]),
        pair(PROMPT, "B.", "A.", places[1]),
    ]
    assert [record.score for record in read_shape("scalar", "scores", reward=3)] == [-0.25, 3.0]


def test_a_sample_of_halos_for_alpacaeval_has_an_instruction(tmp_path):
    row = {"type": "sample", "instruction": "Why?", "output": "So."}
    (record,) = read(tmp_path / "a.jsonl", row, format="demonstrations", layout="halos")
    assert (record.prompt, record.completion) == ("Why?", "So.")


@pytest.mark.parametrize(
    ("name", "format", "change", "reason"),
    [
        ("binary", "thumbs", {"label": 2}, "label is not 0 or 1: '2'"),
        ("binary", "thumbs", {"label": "1"}, "label is not 0 or 1: '1'"),
        ("binary", "thumbs", {"label": 0.0}, "label is not 0 or 1: '0.0'"),
        ("binary", "thumbs", {"type": None}, "null field 'type'"),
        ("binary", "thumbs", {"type": "sample"}, "type is 'sample', and data.format 'thumbs' reads 'binary_feedback'"),
        ("binary", "thumbs", {"output": [user("A")]}, "completion has role 'user', not 'assistant'"),
        ("pairwise", "pairs", {"label": None}, "null field 'label'"),
        ("pairwise", "pairs", {"output_B": [assistant("A.")]}, "chosen and rejected are the same"),
        ("scalar", "scores", {"reward": math.inf}, "score is not a finite number: 'inf'"),
    ],
)
def test_a_row_of_halos_that_cannot_be_used_is_rejected(tmp_path, name, format, change, reason):
    path = tmp_path / "a.jsonl"
    good, bad = read(path, HALOS[name], {**HALOS[name], **change}, format=format, layout="halos")
    assert bad == Rejection(reason, f"{path}:2") and not isinstance(good, Rejection)


def test_human_preferences_of_stanford_are_read(tmp_path):
    row = {
        **{"post_id": "himc90", "domain": "askacademia_train", "upvote_ratio": 0.98, "history": "How do I publish?"},
        **{"c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 340},
        **{"score_B": 166, "human_ref_A": "Write.", "human_ref_B": "Wait.", "labels": 1, "seconds_difference": 2.0},
        "score_ratio": 2.05,
    }
    path = tmp_path / "train.json"
    records = read(path, row, {**row, "labels": 0}, {**row, "labels": True}, format="pairs", layout="shp")
    assert records[:2] == [
        pair("How do I publish?", "Write.", "Wait.", f"{path}:1"),
        pair("How do I publish?", "Wait.", "Write.", f"{path}:2"),
    ]
    bad = [{**row, "labels": label} for label in (2, -1, "1", [1])]
    reasons = [record.reason for record in read(path, *bad, format="pairs", layout="shp")]
    assert reasons == [f"labels is not 0 or 1: {str(row['labels'])!r}" for row in bad]


def oasst(key, parent, role, text, rank=None, **fields):
    names = {"message_id": key, "parent_id": parent, "user_id": "u", "role": role, "text": text, "rank": rank}
    return {**names, "lang": "en", "deleted": False, "message_tree_id": "q", **fields}


TREE = [
    oasst("q", None, "prompter", "Why?"),
    oasst("a1", "q", "assistant", "Worse.", 1),
    oasst("a0", "q", "assistant", "Best.", 0.0, weight=2),
    oasst("a3", "q", "assistant", "Worst.", 3, weight=2),
    oasst("a4", "q", "assistant", "As bad.", 3),
    oasst("a5", "q", "assistant", "Unranked."),
    oasst("q2", "a0", "prompter", "And?", 0),
    oasst("q3", "a0", "prompter", "Or?", 1),
    oasst("b0", "q2", "assistant", "Yes.", 0),
    oasst("b1", "q2", "assistant", "No.", 1),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_ranked_replies_of_open_assistant_are_pairs_of_neighbours_with_their_thread(tmp_path, name):
    path = tmp_path / name
    tree = (
        TREE
        if name == "a.jsonl"
        else [{"weight": None, **row, "rank": row["rank"] and int(row["rank"])} for row in TREE]
    )
    thread = [user("Why?"), assistant("Best."), user("And?")]
    assert read(path, *tree, format="pairs", layout="oasst") == [
        Skipped("a reply without a rank", f"{path}:6"),
        pair([user("Why?")], "Best.", "Worse.", f"{path}:2"),
        pair([user("Why?")], "Worse.", "Worst.", f"{path}:4", 2.0),
        Skipped("a reply of the same rank as another", f"{path}:5"),
        pair(thread, "Yes.", "No.", f"{path}:10"),
    ]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([oasst("q", None, "prompter", "Twice.")], "the same message_id twice"),
        ([oasst(3, None, "prompter", "Why?")], "message_id is not text"),
        ([oasst([3], None, "prompter", "Why?")], "message_id is not text"),
        (
            [
                oasst("s", None, ["prompter"], "S"),
                oasst("x", "s", "assistant", "A", 0),
                oasst("y", "s", "assistant", "B", 1),
            ],
            "role is not known: \"['prompter']\"",
        ),
        ([oasst("x", "lost", "assistant", "Alone.", 0)], None),
        (
            [oasst("x", "lost", "assistant", "A", 0), oasst("y", "lost", "assistant", "B", 1)],
            "the file has no message 'lost', which is replied to",
        ),
        (
            [
                oasst("l", "l", "prompter", "Loop?"),
                oasst("x", "l", "assistant", "A", 0),
                oasst("y", "l", "assistant", "B", 1),
            ],
            "the message replies to itself",
        ),
        (
            [
                oasst("s", None, "system", "S"),
                oasst("x", "s", "assistant", "A", 0),
                oasst("y", "s", "assistant", "B", 1),
            ],
            "role is not known: 'system'",
        ),
        ([oasst("x", "q", "assistant", None, 7)], "null field 'rejected'"),
        ([oasst("x", "q", "assistant", "Of no rank.", math.nan)], None),
        ([oasst("x", "q", "assistant", "Of no rank.", 10**400)], None),
        (["text"], "row is not an object but text"),
    ],
)
def test_messages_of_open_assistant_that_cannot_be_used_are_rejected(tmp_path, rows, reason):
    records = read(tmp_path / "a.jsonl", *TREE, *rows, format="pairs", layout="oasst")
    assert [r.reason for r in records if isinstance(r, Rejection)] == ([reason] if reason else [])
    assert sum(isinstance(record, Preference) for record in records) == 3


def test_ultrafeedback_binarized_is_read(tmp_path):
    row = {
        **{"prompt": "Why?", "prompt_id": "6a", "chosen": [user("Why?"), assistant("So.")], "score_chosen": 8.5},
        **{"rejected": [user("Why?"), assistant("No.")], "messages": [user("Why?"), assistant("So.")]},
        "score_rejected": 7.0,
    }
    path = tmp_path / "train_prefs.parquet"
    records = read(path, row, format="pairs", layout="ultrafeedback")
    assert records == [pair("Why?", "So.", "No.", f"{path}:1")]


def test_kto_mix_is_read(tmp_path):
    row = {"prompt": [user("Why?")], "completion": [assistant("So.")], "label": False, "rating": 3.0, "dataset": "x"}
    path = tmp_path / "train.parquet"
    records = read(path, row, {**row, "label": None}, layout="kto_mix", label_field="ignored")
    assert records == [
        Feedback([user("Why?")], "So.", False, 1.0, f"{path}:1"),
        Skipped("no value in the field 'label'", f"{path}:2"),
    ]


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"fields", "argilla"}))
def test_a_file_of_another_layout_is_refused_naming_the_column(tmp_path, layout):
    format = next(iter(LAYOUTS[layout].columns))
    with pytest.raises(ConfigError, match=rf"no column .* The columns are 'nothing'.*layout, which is '{layout}'"):
        read(tmp_path / "a.jsonl", {"nothing": 1}, layout=layout, format=format)


def test_a_layout_refuses_a_format_that_it_cannot_hold(tmp_path):
    with pytest.raises(ConfigError, match=r"layout='hh' holds no thumbs\. With it data.format is 'pairs'\. Set"):
        read(tmp_path / "a.jsonl", {}, layout="hh")
    with pytest.raises(ConfigError, match=r"'thumbs' or 'scores'"):
        read(tmp_path / "a.jsonl", {}, layout="messages", format="pairs")


def test_a_layout_refuses_a_prompt_template(tmp_path):
    with pytest.raises(ConfigError, match=r"prompt_template='\{x\}' has no use with data.layout='kto_mix'"):
        read(tmp_path / "a.jsonl", {}, layout="kto_mix", prompt_template="{x}")


def test_a_chat_log_reaches_the_index_with_a_row_for_every_rated_turn(make_index):
    index = make_index([LOG, LOG | {"weight": 1}, {"messages": [user("Hello?")]}], layout="messages")
    assert index.desirable.tolist() == [True, False] * 2
    assert index.weights.tolist() == [2, 3, 1, 3]
    assert [index.place(row).rpartition(":")[2] for row in range(4)] == ["1", "1", "2", "2"]
    assert index.manifest["skipped"] == 1 and index.manifest["rejected"] == 0
    assert len(index.prompt(1)) > len(index.prompt(0))


def test_transcripts_reach_the_index_as_pairs(make_index):
    rows = [{"chosen": f"{HH} No {i}.", "rejected": f"{HH} Yes {i}."} for i in range(3)]
    index = make_index(rows, format="pairs", layout="hh")
    assert index.rejected.tolist() == [1, -1, 3, -1, 5, -1] and len(set(index.prompt_hashes.tolist())) == 1
