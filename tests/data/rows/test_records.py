import bz2
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows import files, json_rows
from kto_jax.data.rows.records import Feedback, Rejection, Skipped, read_records, template_fields

OR_RATINGS = " if there are no other labels; config.data.format='scores' reads ratings"
GOOD = {"prompt": "Hello?", "completion": "Hi.", "label": True}


def read(path, **fields):
    return list(read_records(str(path), DataConfig(**fields)))


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_a_row_becomes_feedback_with_its_place(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", GOOD, {**GOOD, "label": False, "weight": 2, "extra": None})
    assert read(path) == [
        Feedback("Hello?", "Hi.", True, 1.0, f"{path}:1"),
        Feedback("Hello?", "Hi.", False, 2.0, f"{path}:2"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completion": "Hi.", "label": True}, "missing field 'prompt'"),
        ({**GOOD, "completion": None}, "null field 'completion'"),
        ({**GOOD, "completion": ""}, "empty completion"),
        ({**GOOD, "completion": " \n"}, "empty completion"),
        ({**GOOD, "prompt": ""}, "empty prompt"),
        ({**GOOD, "prompt": 3}, "prompt is not text but a number"),
        ({**GOOD, "completion": "a\0b"}, "NUL character in completion"),
        (
            {**GOOD, "label": "maybe"},
            "label is not mapped: 'maybe'; --config.data.label_map=\"{'maybe': True}\" would make it desirable",
        ),
        (
            {**GOOD, "label": "False"},
            """label is not mapped: 'False'; set --config.data.label_map="{'True': True, 'False': False}\"""",
        ),
        (
            {**GOOD, "label": 1},
            "label is not mapped: '1'; set --config.data.label_map=\"{'1': True, '0': False}\"" + OR_RATINGS,
        ),
        (
            {**GOOD, "label": -1.0},
            "label is not mapped: '-1.0'; set --config.data.label_map=\"{'1.0': True, '-1.0': False}\"" + OR_RATINGS,
        ),
        ({**GOOD, "label": [True, True]}, "label is not a boolean, text or number but a list of 2"),
        ({**GOOD, "weight": -1}, "weight is not a finite number of at least 0: '-1'"),
        ({**GOOD, "weight": True}, "weight is not a finite number of at least 0: 'True'"),
        ({**GOOD, "weight": "heavy"}, "weight is not a finite number of at least 0: 'heavy'"),
        ({**GOOD, "weight": float("nan")}, "weight is not a finite number of at least 0: 'nan'"),
        ({**GOOD, "prompt": []}, "empty prompt"),
        ({**GOOD, "prompt": ["Hello?"]}, "message of the prompt is not an object but text"),
        (
            {**GOOD, "prompt": [{"role": "boss", "content": "x"}]},
            "role of the prompt is not known: 'boss'; data.roles={'boss': 'user'} maps it",
        ),
        ({**GOOD, "prompt": [{"role": "user"}]}, "message of the prompt has no content"),
        ({**GOOD, "prompt": [{"role": "user", "content": ["x"]}]}, "part of the prompt is not an object but text"),
        ({**GOOD, "prompt": [{"role": "assistant", "content": "x"}]}, "prompt ends with an assistant message"),
        ({**GOOD, "prompt": [{"role": "system", "content": "x"}]}, "prompt has no message after the system message"),
        ({**GOOD, "completion": []}, "empty completion"),
        ({**GOOD, "completion": [{"role": "user", "content": "x"}]}, "completion has role 'user', not 'assistant'"),
        ({**GOOD, "completion": [{"role": "assistant", "content": " "}]}, "empty completion"),
        (["not", "an", "object"], "row is not an object but a list of 3"),
        (b'{"prompt": "a\xff"}', "invalid UTF-8 at byte 13; save the file as UTF-8"),
        (b'{"prompt": "a", "completion": "b\\ud800", "label": true}', "lone surrogate in completion"),
        (b'{"prompt": "a", "compl', "invalid JSON: Unterminated string starting at"),
        (b"[" * 100_000, "invalid JSON: RecursionError"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON: ValueError"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason_and_line_and_costs_only_itself(tmp_path, row, reason):
    path = write_lines(tmp_path / "a.jsonl", GOOD, row, GOOD)
    first, bad, last = read(path)
    assert bad == Rejection(reason, f"{path}:2")
    assert isinstance(first, Feedback) and isinstance(last, Feedback)


def test_a_byte_order_mark_carriage_returns_blank_lines_and_a_missing_last_newline_cost_nothing(tmp_path):
    line = json.dumps(GOOD).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    first, blank, last = read(path)
    assert [first, last] == [Feedback("Hello?", "Hi.", True, 1.0, f"{path}:{number}") for number in (1, 3)]
    assert blank == Skipped("a blank line", f"{path}:2")


def test_a_giant_line_is_rejected_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_BYTES", 200)
    path = write_lines(tmp_path / "a.jsonl", GOOD, {**GOOD, "completion": "x" * 1000}, GOOD)
    first, bad, last = read(path)
    assert bad == Rejection("line is longer than 200 bytes", f"{path}:2")
    assert isinstance(first, Feedback) and last.place == f"{path}:3"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ({"label": None}, "no value in the field 'label'"),
        ({"label": ""}, "no value in the field 'label'"),
        ({"label": float("nan")}, "no value in the field 'label'"),
        ({}, "missing field 'label'"),
    ],
)
def test_a_row_without_a_label_is_skipped_and_counted_or_rejected(tmp_path, label, reason):
    row = {name: value for name, value in GOOD.items() if name != "label"} | label
    path = write_lines(tmp_path / "a.jsonl", GOOD, row)
    assert read(path)[1] == Skipped(reason, f"{path}:2")
    assert read(path, unlabelled="reject")[1] == Rejection(reason, f"{path}:2")


def test_labels_are_mapped_and_none_leaves_the_row_out(tmp_path):
    rows = [{**GOOD, "label": label} for label in ("good", "bad", "plot", 1, 2.0, True, "else")]
    label_map = {"good": True, "bad": False, "plot": None, "1": True, "2.0": False}
    records = read(write_lines(tmp_path / "a.jsonl", *rows), label_map=label_map)
    found = [r.desirable if isinstance(r, Feedback) else type(r) for r in records]
    assert found == [True, False, Skipped, True, False, True, Rejection]


def test_an_explicit_mapping_of_booleans_wins(tmp_path):
    records = read(write_lines(tmp_path / "a.jsonl", GOOD), label_map={"True": False})
    assert records[0].desirable is False


def test_chat_messages_keep_role_and_content_only(tmp_path):
    row = {
        "prompt": [{"role": "system", "content": "Be kind.", "name": "x"}, {"role": "user", "content": "Hello?"}],
        "completion": [{"role": "assistant", "content": "Hi."}],
        "label": False,
    }
    (record,) = read(write_lines(tmp_path / "a.jsonl", row))
    assert record.prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    assert record.completion == "Hi."


def test_csv_places_are_first_lines_and_quotes_may_span_lines(tmp_path):
    path = tmp_path / "a.csv.bz2"
    text = b'prompt,completion,label\nHello?,"Hi,\nyou.",up\na,b\nx,\xff,up\nHello?,Go.,down\nx,"cut,up\n'
    path.write_bytes(bz2.compress(text))
    records = read(path, label_map={"up": True, "down": False})
    assert records[0] == Feedback("Hello?", "Hi,\nyou.", True, 1.0, f"{path}:2")
    reason = "2 columns where the header has 3; the first line must name the columns"
    assert records[1] == Rejection(reason, f"{path}:4")
    assert records[2] == Rejection("invalid UTF-8; save the file as UTF-8, in Excel as 'CSV UTF-8'", f"{path}:5")
    assert records[3] == Feedback("Hello?", "Go.", False, 1.0, f"{path}:6")
    assert records[4] == Rejection("invalid CSV: unexpected end of data", f"{path}:7")


def test_a_cut_gzip_file_keeps_the_rows_before_the_cut(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps({**GOOD, "prompt": str(i)}).encode() + b"\n" for i in range(2000)))
    path.write_bytes(whole[: len(whole) // 2])
    *rows, last = read(path)
    assert len(rows) > 100 and all(isinstance(row, Feedback) for row in rows)
    assert last == Rejection("compressed file is cut or broken: EOFError", f"{path}:{len(rows) + 1}")


def test_parquet_and_json_give_the_same_rows_as_jsonl(tmp_path):
    rows = [{**GOOD, "prompt": f"Question {i}?", "label": i % 2 == 0} for i in range(5)]
    lines = read(write_lines(tmp_path / "a.jsonl", *rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        records = read(tmp_path / name)
        assert [(r.prompt, r.desirable) for r in records] == [(r.prompt, r.desirable) for r in lines]
        assert [r.place for r in records] == [f"{tmp_path / name}:{i}" for i in range(1, 6)]


def test_a_hub_set_is_streamed_into_a_file_that_reads_as_any_other(tmp_path):
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", GOOD, {**GOOD, "label": False})
    files.fetch_hub(f"hub:{tmp_path}/set/train", tmp_path / "rows.jsonl")
    assert [record.desirable for record in read(tmp_path / "rows.jsonl")] == [True, False]


def test_an_unreadable_hub_dataset_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        files.fetch_hub(f"hub:{tmp_path}/nothing/train", tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="hub:org/name/split"):
        files.fetch_hub("hub:name", tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_glob_reads_its_files_by_name(tmp_path):
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", {**GOOD, "prompt": name})
    assert [record.prompt for record in read(tmp_path / "*.jsonl")] == ["a", "b"]
    with pytest.raises(ConfigError, match="matches no file"):
        read(tmp_path / "*.csv")


def test_a_prompt_template_fills_in_plain_fields(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", {"film": "Alien", "completion": "Loud.", "label": True}, {**GOOD, "film": ""}
    )
    first, second = read(path, prompt_template="Review {film} in {{one}} word.")
    assert first.prompt == "Review Alien in {one} word." and second.prompt == "Review  in {one} word."


@pytest.mark.parametrize("template", ["{film.__class__}", "{film[0]}", "{}", "{0}", "{film", "no field", "{a:{b}}"])
def test_a_prompt_template_that_reaches_into_fields_is_refused(template):
    with pytest.raises(ConfigError, match="prompt_template"):
        template_fields(template)


def test_an_unknown_column_is_refused_naming_the_columns_and_the_nearest(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "completions": "b", "label": True})
    with pytest.raises(
        ConfigError, match=r"no column 'completion'.*'prompt', 'completions', 'label'.*mean 'completions'"
    ):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "no known ending"),
        ("a.parquet.gz", b"x", "no known ending"),
        ("a.arrow.zst", b"x", "no known ending"),
        ("a.json", b'"text"', "one list of objects"),
        ("a.json", b"", "one list of objects"),
        ("a.arrow", b"ARROW1 broken", "cannot be read as Arrow"),
        ("a.feather", b"", "cannot be read as Arrow"),
        ("a.parquet", b"PAR1 broken", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)
