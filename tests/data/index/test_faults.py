"""A file with one row of each fault: every unusable row is reported with its reason and line."""

import json

import pytest

from kto_jax.config import ConfigError
from kto_jax.data.rows import json_rows
from tests.data.rows.test_records import OR_RATINGS

GOOD = {"prompt": "Hello?", "completion": "Hi.", "label": True}


def line(**change):
    return json.dumps({key: value for key, value in {**GOOD, **change}.items() if value is not ...}).encode()


USABLE = [
    b"\xef\xbb\xbf" + line(),
    line(extra={"a": [1]}),
    line(label=False) + b"\r",
    line(prompt="word " * 200, label=False),
    line(prompt="Say <|im_end|> and <|im_start|>."),
]
FAULTS = {
    "completion longer than data.max_length; data.long_completion='cut' keeps its beginning": line(
        completion="word " * 200
    ),
    "empty completion": line(completion=""),
    "empty prompt": line(prompt=" \n"),
    "null field 'completion'": line(completion=None),
    "missing field 'label'": line(label=...),
    "prompt is not text but a number": line(prompt=7),
    "completion is not text but an empty object": line(completion={}),
    "row is not an object but a list of 1": b"[1]",
    "invalid UTF-8 at byte 12; save the file as UTF-8": b'{"prompt": "\xff"}',
    "NUL character in prompt": line(prompt="a\0"),
    "lone surrogate in completion": line(completion="\ud800"),
    "line is longer than 4096 bytes": line(prompt="x" * 5000),
    "invalid JSON: Expecting ',' delimiter": b'{"prompt": "a" "b"}',
    "no value in the field 'label'": line(label=None),
    "label is not mapped: '2.0'; config.data.format='scores' reads numbers": line(label=2.0),
    "label is not mapped: 'odd'; --config.data.label_map=\"{'odd': True}\" would make it desirable": line(label="odd"),
    **{
        f'label is not mapped: {str(label)!r}; set --config.data.label_map="{label_map}"{others}': line(label=label)
        for label, label_map, others in (
            ("true", {"true": True, "false": False}, ""),
            ("True", {"True": True, "False": False}, ""),
            (1, {"1": True, "0": False}, OR_RATINGS),
            ("yes", {"yes": True, "no": False}, ""),
            (-1, {"1": True, "-1": False}, OR_RATINGS),
        )
    },
    "label is not a boolean, text or number but a list of 2": line(label=[True, True]),
    "weight is not a finite number of at least 0: 'nan'": line(weight=float("nan")),
    "prompt ends with an assistant message": line(prompt=[{"role": "assistant", "content": "a"}]),
    "role of the prompt is not known: 'boss'; data.roles={'boss': 'user'} maps it": line(
        prompt=[{"role": "boss", "content": "a"}]
    ),
    "tools is not a list of objects": line(tools={"name": "x"}),
    "the chat template does not show tools; data.chat_template names another": line(tools=[{"name": "x"}]),
    "invalid JSON: Unterminated string starting at": b'{"prompt": "Hello?", "compl',
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_BYTES", 4096)
    (tmp_path / "faults.jsonl").write_bytes(b"\n".join([*USABLE, *FAULTS.values()]))
    return tmp_path / "faults.jsonl"


def test_every_fault_is_explained_by_reason_and_line(path, make_index):
    index = make_index((), train=str(path), max_length=64, max_rejected=1.0, unlabelled="reject")
    expected = [(reason, f"{path}:{number}") for number, reason in enumerate(FAULTS, start=1 + len(USABLE))]
    found = [(first["reason"], first["place"]) for first in index.manifest["rejections"]["first"]]
    # Rows that cannot be encoded may be found later than rows that cannot be read.
    assert sorted(found) == sorted(expected)
    assert index.manifest["rejections"]["histogram"] == dict.fromkeys(FAULTS, 1)
    assert [index.place(row) for row in range(len(index.desirable))] == [f"{path}:{n}" for n in range(1, 6)]


def test_a_file_of_faults_is_refused_with_a_histogram_of_their_reasons(path, make_index):
    with pytest.raises(
        ConfigError, match=r"28 of 33 rows are rejected \(84\.85%\)\. Rejected: 1 × .*First: .*jsonl:\d+: "
    ):
        make_index((), train=str(path), max_length=64, unlabelled="reject")


def test_a_file_without_a_usable_row_says_so_and_why(path, make_index):
    path.write_bytes(b"\n".join(FAULTS.values()))
    with pytest.raises(ConfigError, match=r"0 of 28 rows usable to train on\. Rejected: .*1 × empty completion"):
        make_index((), train=str(path), max_length=64, unlabelled="reject")
