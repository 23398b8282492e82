"""Files as people have them: separators, encodings, messages as text, ratings beside messages, nulls of Arrow."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import read_records

TURNS = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]


def read(path, **fields):
    return list(read_records(str(path), DataConfig(**fields)))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(("start", "encoding"), [("", "utf-8"), ("", "utf-8-sig"), ("", "utf-16"), ("sep", "utf-8")])
def test_a_spreadsheet_is_read_whatever_separates_its_columns(tmp_path, separator, start, encoding):
    rows = [["prompt", "completion", "label"], ["Où?", f'"Là{separator} ici\nou ""là""."', "yes"]]
    text = "".join(separator.join(row) + "\r\n" for row in rows)
    text = f"sep={separator}\r\n{text}" if start else text
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    (record,) = read(tmp_path / "a.csv", label_map={"yes": True})
    assert (record.prompt, record.completion) == ("Où?", f'Là{separator} ici\nou "là".')


def test_a_header_of_one_column_stays_one_column(tmp_path):
    (tmp_path / "a.csv").write_text("completion\nGood; really.\n")
    with pytest.raises(ConfigError, match="no column 'prompt'"):
        read(tmp_path / "a.csv", format="demonstrations")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label,completion\nQ,A,yes,B\n")
    with pytest.raises(ConfigError, match="column 'completion' twice"):
        read(tmp_path / "a.csv", label_map={"yes": True})


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_that_are_kept_as_text_are_messages(tmp_path, write):
    row = {"prompt": write(TURNS[:1]), "completion": write(TURNS[1:]), "label": True}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (record,) = read(tmp_path / "a.jsonl")
    assert (record.prompt, record.completion) == (TURNS[:1], "A.")


@pytest.mark.parametrize("text", ["[1, 2]", "[{", '[{"a": 1}]', "[{'role': open('x')}]", '[{"role": ' * 3000])
def test_text_that_only_looks_like_messages_stays_text(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q?", "completion": text, "label": True}))
    (record,) = read(tmp_path / "a.jsonl")
    assert record.completion == text


def test_a_rating_beside_messages_is_of_the_last_turn(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*TURNS, *TURNS], "label": False}))
    (record,) = read(tmp_path / "a.jsonl", layout="messages")
    assert (record.prompt, record.completion, record.desirable) == ([*TURNS, TURNS[0]], "A.", False)


def test_sharegpt_and_alpaca_are_read_with_system_and_history(tmp_path):
    said = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    (tmp_path / "s.jsonl").write_text(json.dumps({"conversations": said, "kto_tag": True}))
    (record,) = read(tmp_path / "s.jsonl", layout="sharegpt")
    assert (record.prompt, record.completion) == ([{"role": "system", "content": "S"}, TURNS[0]], "A.")
    row = {"instruction": "Do", "input": "this", "output": "A.", "system": "S", "history": [["Q?", "A."]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"kto_tag": False}))
    (record,) = read(tmp_path / "a.jsonl", layout="alpaca")
    assert record.prompt == [{"role": "system", "content": "S"}, *TURNS, {"role": "user", "content": "Do\nthis"}]
    assert record.completion == "A." and not record.desirable


def test_columns_that_look_like_content_and_are_not_read_are_named(tmp_path, capsys):
    row = {"instruction": "Do", "input": "this", "output": "A.", "history": [], "label": True}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    read(tmp_path / "a.jsonl", prompt_field="instruction", completion_field="output")
    warning = capsys.readouterr().err
    assert "'input'" in warning and "alpaca" in warning and "history'" not in warning


def test_nulls_that_arrow_adds_to_objects_are_not_read(tmp_path):
    tools = [{"name": "weather", "where": {"town": "Ghent"}}, {"name": "clock", "where": {"zone": "PET"}}]
    rows = [{"prompt": "Q?", "completion": "A.", "label": True, "tools": [tool]} for tool in tools]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [json.loads(record.prompt[0]["content"]) for record in read(tmp_path / "a.parquet")]
    assert found == [[tool] for tool in tools]
