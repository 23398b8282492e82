"""Every kind of file, whole and broken: rows come with their places, and a broken row costs only itself."""

import bz2
import datetime
import gzip
import io
import json
import tracemalloc

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pytest

from kto_jax.config import ConfigError
from kto_jax.data.rows import json_rows
from kto_jax.data.rows.files import expand, read_rows
from kto_jax.data.rows.rejection import Rejection, Skipped

ROWS = [{"prompt": f'Question {i}? 5" é [{{,', "completion": "a\\b\n", "label": i % 2 == 0} for i in range(300)]


def zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def lines(rows=ROWS):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(path):
    (file,) = expand(str(path))
    return list(read_rows(file))


def arrow(rows, make_writer):
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with make_writer(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=100):
            writer.write_batch(batch)
    return sink.getvalue()


WHOLE = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda: gzip.compress(lines()),
    "a.jsonl.bz2": lambda: bz2.compress(lines()),
    "a.jsonl.zst": lambda: zst(lines()),
    "two_frames.jsonl.zst": lambda: zst(lines(ROWS[:100])) + zst(lines(ROWS[100:])),
    "list.json": lambda: json.dumps(ROWS).encode(),
    "bom.json": lambda: b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode() + b"\r\n",
    "list.json.zst": lambda: zst(json.dumps(ROWS).encode()),
    "lines.json": lines,
    "lines.json.zst": lambda: zst(lines()),
    "lines.json.gz": lambda: gzip.compress(lines()),
    "list.jsonl": lambda: json.dumps(ROWS, indent=2).encode(),
    "a.ndjson": lines,
    "objects.json": lambda: b"\n\n".join(json.dumps(row, indent=2).encode() for row in ROWS) + b"\n",
    "objects.json.gz": lambda: gzip.compress(b"".join(json.dumps(row, indent=4).encode() + b"\r\n" for row in ROWS)),
    "wrapped.json": lambda: json.dumps({"meta": {"page": 1}, "data": ROWS}, indent=2).encode(),
    "file.arrow": lambda: arrow(ROWS, pyarrow.ipc.new_file),
    "stream.arrow": lambda: arrow(ROWS, pyarrow.ipc.new_stream),
    "a.feather": lambda: arrow(ROWS, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_file_gives_the_same_rows_and_places(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(WHOLE[name]())
    expected = [(f"{path}:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert read(path) == expected
    # Wherever a chunk ends: inside a text, at a bracket, between a backslash and its character.
    for size in (3, 7, 64):
        monkeypatch.setattr(json_rows, "_CHUNK_BYTES", size)
        assert read(path) == expected


def test_a_feather_file_of_pyarrow_is_read_with_its_compression(tmp_path):
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.feather", compression="zstd")
    assert [row for _, row in read(tmp_path / "a.feather")] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.json.gz", "a.json.zst"])
def test_a_cut_compressed_file_keeps_the_rows_before_the_cut(tmp_path, name):
    rows = [{"number": i, "text": str(hash((i, "x"))) * 5} for i in range(20_000)]
    content = lines(rows) if "jsonl" in name else json.dumps(rows).encode()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zst}[name.rpartition(".")[2]]
    packed = pack(content)
    path = tmp_path / name
    path.write_bytes(packed[: len(packed) // 2])
    *whole, (place, last) = read(path)
    assert len(whole) > 1000 and [row for _, row in whole] == rows[: len(whole)]
    assert place == last.place == f"{path}:{len(whole) + 1}"
    assert last.reason.startswith("compressed file is cut or broken")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.zst", "a.json.bz2", "a.csv.zst"])
def test_a_file_that_only_claims_to_be_compressed_is_rejected_at_its_first_row(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 100)
    ((_, rejection),) = read(tmp_path / name)
    assert rejection.place == f"{tmp_path / name}:1"
    assert rejection.reason.startswith("compressed file is cut or broken")


def test_a_line_of_50_mb_is_rejected_and_takes_little_memory(tmp_path):
    good, long = json.dumps({"a": 1}), json.dumps({"a": "x" * (50 << 20)})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{long}\n{good}\n")
    (tmp_path / "b.json").write_text(f"[{good},\n{long},\n{good}]")
    del long
    for name, what in (("a.jsonl", "line"), ("b.json", "row")):
        path = tmp_path / name
        tracemalloc.start()
        rows = read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rejection = Rejection(f"{what} is longer than {8 << 20} bytes", f"{path}:2")
        assert rows == [(f"{path}:1", {"a": 1}), (f"{path}:2", rejection), (f"{path}:3", {"a": 1})]
        assert peak < 40 << 20


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7; save the file as UTF-8"),
        (b'{"a": nothing}', "invalid JSON: Expecting value"),
        (b'{"a": 1 "b": 2}', "invalid JSON: Expecting ',' delimiter"),
        (b"1}", "invalid JSON: Extra data"),
        (b"", "invalid JSON: Expecting value"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid JSON: RecursionError"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON: ValueError"),
    ],
)
def test_a_broken_row_of_a_json_list_costs_only_itself(tmp_path, row, reason):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1}, ' + row + b', {"a": 3}]')
    assert read(path) == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:2", Rejection(reason, f"{path}:2")),
        (f"{path}:3", {"a": 3}),
    ]


@pytest.mark.parametrize("end", [b"", b', {"a": "cut', b', {"a": 2}', b", ", b', {"a": "\\'])
def test_a_json_list_that_is_cut_keeps_its_whole_rows(tmp_path, end):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 0}, {"a": 1}' + end)
    *whole, (_, last) = read(path)
    assert [row for _, row in whole] == [{"a": i} for i in range(len(whole))] and len(whole) >= 1
    assert last == Rejection("invalid JSON: the file ends before its list", f"{path}:{len(whole) + 1}")


def test_half_a_last_line_is_rejected_with_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines()[:-20])
    *whole, (_, last) = read(path)
    assert len(whole) == 299 and last.place == f"{path}:300" and last.reason.startswith("invalid JSON")


def test_a_directory_gives_its_readable_files_by_name(tmp_path):
    names = ["b.jsonl", "a.jsonl.zst", "sub/c.json", "sub/d.arrow"]
    for name in ["README.md", ".hidden.jsonl", ".cache/x.jsonl", "dataset_info.json", "sub/state.json", "_part/y.csv"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("nothing")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in expand(str(tmp_path))] == [
        str(tmp_path / name) for name in ("a.jsonl.zst", "b.jsonl", "sub/c.json", "sub/d.arrow")
    ]


def test_a_directory_without_a_readable_file_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ConfigError, match=r"directory without a readable file\. Read are \.jsonl.*Check the path"):
        expand(str(tmp_path))


def test_a_set_that_datasets_saved_to_disk_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"), num_shards=2)
    found = [row for file in expand(str(tmp_path / "set")) for _, row in read_rows(file)]
    assert found == ROWS


@pytest.mark.parametrize("source", ["feedback.jsonl", "data/feedback.jsonl", "/no/such/folder/feedback.jsonl"])
def test_a_missing_file_is_answered_with_what_a_source_of_feedback_may_be(source):
    with pytest.raises(
        ConfigError, match=rf"data source '{source}' does not exist\. It is a file, a directory or a glob"
    ):
        expand(source)


def test_a_file_and_a_folder_are_found_from_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    assert [file.path for file in expand("~/rows.jsonl")] == [tmp_path / "rows.jsonl"]
    assert [file.path for file in expand("~")] == [tmp_path / "rows.jsonl"]


def test_one_object_over_many_lines_is_one_row_and_a_list_inside_it_is_not_taken_for_rows(tmp_path):
    talk = {"title": "T", "messages": [{"role": "user", "content": "}{"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps(talk, indent=2))
    assert read(tmp_path / "a.json") == [(f"{tmp_path / 'a.json'}:1", talk)]


@pytest.mark.parametrize("end", [b'{\n "a": 2', b'{\n "a": "cut'])
def test_objects_over_many_lines_that_are_cut_keep_the_whole_ones(tmp_path, end):
    path = tmp_path / "a.json"
    path.write_bytes(b'{\n "a": 1\n}\n' + end)
    assert read(path) == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:2", Rejection("invalid JSON: the file ends before an object", f"{path}:2")),
    ]


def test_a_sheet_separated_by_tabs_is_read_with_commas_quotes_and_blank_lines(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes('\ufeffprompt\tcompletion\nQ, q?\t"A\n\tb"\n\nR?\tB\n'.encode())
    assert read(path) == [
        (f"{path}:2", {"prompt": "Q, q?", "completion": "A\n\tb"}),
        (f"{path}:4", Skipped("a blank line", f"{path}:4")),
        (f"{path}:5", {"prompt": "R?", "completion": "B"}),
    ]
    (tmp_path / "one.tsv").write_text("a,b\n1,2\n")
    assert [row for _, row in read(tmp_path / "one.tsv")] == [{"a,b": "1,2"}]


def workbook(path, **sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_workbook_gives_the_rows_of_its_first_sheet_and_names_the_others(tmp_path, capsys):
    rows = [
        ["prompt", "thumb", None, "when"],
        ["Où?", 1, None, datetime.date(2026, 1, 2)],
        [],
        ["R?", None, "note", None],
    ]
    path = workbook(tmp_path / "a.xlsx", empty=[], feedback=rows, notes=[["x"]])
    assert read(path) == [
        (f"{path}:2", {"prompt": "Où?", "thumb": 1, "when": "2026-01-02 00:00:00"}),
        (f"{path}:3", Skipped("a blank line", f"{path}:3")),
        (f"{path}:4", {"prompt": "R?", "thumb": None, "when": None}),
    ]
    assert "only the sheet 'feedback' is read, not 'notes'" in capsys.readouterr().err


def test_a_workbook_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="column 'a' twice"):
        read(workbook(tmp_path / "twice.xlsx", sheet=[["a", "a"], [1, 2]]))
    (tmp_path / "broken.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="cannot be read as Excel: BadZipFile"):
        read(tmp_path / "broken.xlsx")
    monkeypatch.setattr("kto_jax.config.packages.is_installed", lambda module: False)
    with pytest.raises(ConfigError, match="Run pip install openpyxl, or save the workbook as CSV"):
        read(tmp_path / "twice.xlsx")


def test_files_of_unknown_ending_in_a_directory_are_counted_and_named(tmp_path, capsys):
    for name in ("a.jsonl", "b.txt", "c.txt", "LICENSE", ".hidden.txt"):
        (tmp_path / name).write_text("")
    assert len(expand(str(tmp_path))) == 1
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: 3 files of unknown ending are not read: 2 × .txt, 1 × no ending\n"
    )
