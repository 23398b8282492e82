"""Rows mutated at random, in values and in bytes: each becomes a record or a rejection with its place."""

import collections
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kto_jax.config import DataConfig
from kto_jax.data.rows.files import SourceFile, read_rows
from kto_jax.data.rows.layouts import LAYOUTS
from kto_jax.data.rows.records import Feedback, Preference, Rejection, Skipped, completions_of, read_records
from kto_jax.data.tokens.encoded_rows import Limits, encode_feedback
from tests.data.conftest import InProcessWorkers
from tests.data.rows.test_layouts import HALOS, HH, LOG, TREE, assistant, user
from tests.data.test_docs import BLOCKS, rows_of, settings_of
from tests.mutations import mutate_line

CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
}
PARTS = [{"type": "text", "text": "Q"}]
CALLS = [user(PARTS), CALLING, {"role": "tool", "content": "B", "tool_call_id": "1"}, assistant("A")]
CHAT = {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
GOOD = {
    ("fields", "thumbs"): [{"prompt": "Q", "completion": "A", "label": True, "weight": 1, "tools": [{"name": "x"}]}],
    ("fields", "pairs"): [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        CHAT,
        {**CHAT, "prompt": "Q"},
        {"prompt": CALLS[:1], "chosen": [CALLING], "rejected": "B"},
    ],
    ("fields", "scores"): [{"prompt": [user("Q")], "completion": [assistant("A")], "score": 0.5}],
    ("fields", "demonstrations"): [{"prompt": [{"role": "system", "content": "S"}, user("Q")], "completion": "A"}],
    ("messages", "thumbs"): [LOG, {"messages": [*CALLS[:3], {**CALLS[3], "feedback": True}]}],
    ("messages", "scores"): [{"messages": [user("Q"), assistant("A", feedback=3), assistant("B", score=4)]}],
    ("halos", "demonstrations"): [HALOS["sample"]],
    ("halos", "thumbs"): [HALOS["binary"]],
    ("halos", "pairs"): [HALOS["pairwise"]],
    ("halos", "scores"): [HALOS["scalar"]],
    ("hh", "pairs"): [{"chosen": f"{HH} A", "rejected": f"{HH} B"}],
    ("shp", "pairs"): [{"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}],
    ("oasst", "pairs"): TREE,
    ("ultrafeedback", "pairs"): [{**CHAT, "prompt": "Q"}],
    ("kto_mix", "thumbs"): [{"prompt": [user("Q")], "completion": [assistant("A")], "label": False}],
}
for words, text in BLOCKS:  # Every documented layout, including those without rows above.
    kind = settings_of(words)
    key = (kind.get("layout", "fields"), kind["format"])
    GOOD[key] = [*GOOD.get(key, []), *rows_of(text)]


def texts_of(value):
    """Every text in a JSON value, in order, except keys and the types of content parts (they separate joined parts)."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key != "type"]
    for item in value if isinstance(value, list) else ():
        yield from texts_of(item)


def apart(row, number):
    """A press on an answer of its own, so that later lines do not replace it; other rows as they are."""
    if "press" not in row:
        return row
    return row | {name: f"{row[name]}-{number}" for name in ("id", "answer", "comparison") if name in row}


def mutated_files(layout, count):
    """Files of one layout, in any of its formats."""
    kinds = [kind for kind in GOOD if kind[0] == layout]

    @st.composite
    def drawn(draw):
        kind, chance = draw(st.sampled_from(kinds)), draw(st.randoms(use_true_random=False))
        lines = [mutate_line(chance, [apart(row, number) for row in GOOD[kind]]) for number in range(count)]
        return kind, draw(st.sampled_from([".jsonl", ".json"])), lines

    return drawn()


@pytest.fixture(scope="module")
def check(tokenizer, tmp_path_factory):
    """Reads and tokenizes the lines of a file, the first of which is good."""
    directory = tmp_path_factory.mktemp("fuzz")
    limits = Limits(max_length=64, max_prompt_length=32, long_completion="cut", vocab_size=512)

    def run(case, counts=None):
        (layout, format), suffix, lines = case
        first = json.dumps(GOOD[layout, format][0]).encode()
        path = directory / f"rows{suffix}"
        separator, start, end = (b"\n", b"", b"") if suffix == ".jsonl" else (b",\n", b"[", b"]")
        path.write_bytes(start + separator.join([first, *lines]) + end)
        records = list(read_records(str(path), DataConfig(layout=layout, format=format)))
        accepted = []
        for record in records:
            assert isinstance(record, Feedback | Preference | Rejection | Skipped)
            assert record.place.startswith(f"{path}:") and int(record.place.removeprefix(f"{path}:")) >= 1
            if isinstance(record, Rejection):
                assert record.reason and len(record.reason) < 500
            elif not isinstance(record, Skipped):
                accepted.append(record)
                for row in completions_of(record):
                    assert isinstance(row.desirable, bool) and 0 <= row.weight < np.inf and abs(row.score) < np.inf
        assert layout == "oasst" or not isinstance(records[0], Rejection)
        texts = list(texts_of([row for _, row in read_rows(SourceFile(path, "rows"))]))
        for record in accepted:
            for row in completions_of(record):
                said = row.completion if isinstance(row.completion, str) else row.completion["content"]
                held = any(said.strip() in text for text in texts) or said.strip() in "".join(texts)
                assert held, f"{said!r} is not in the file"
        encoded = encode_feedback(accepted, limits)
        assert len(encoded.reasons) == len(accepted)
        assert (encoded.prompt_lengths < 64).all() and (encoded.completion_lengths < 64).all()
        if counts is not None:
            counts["accepted"] += len(accepted)
        return len(lines)

    with InProcessWorkers(1, None, tokenizer):
        yield run


SETTINGS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutated_rows_are_read_or_rejected(check, layout):
    """Three hundred of every layout."""

    @settings(max_examples=15, **SETTINGS)
    @given(case=mutated_files(layout, 20))
    def run(case):
        assert check(case) == 20

    run()


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_mutated_rows_of_every_layout_are_read_or_rejected(check, layout):
    counts = collections.Counter()

    @settings(max_examples=250, **SETTINGS)
    @given(case=mutated_files(layout, 40))
    def run(case):
        counts["rows"] += check(case, counts)

    run()
    print(f"{layout}: {dict(counts)}")
    # Messages of one tree that are mutated by themselves often lose their parent or their sibling.
    assert counts["rows"] >= 10_000 and counts["accepted"] > (100 if layout == "oasst" else 2000)
