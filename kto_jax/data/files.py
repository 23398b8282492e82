"""Raw rows from JSONL, JSON, CSV and Parquet files, plain or compressed, each with its place.

JSONL is read line by line in bytes, so that a broken line costs only itself.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from kto_jax.config import ConfigError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_COMPRESSED: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open}
_MAX_BYTES = 8 << 20
"""Longest line or CSV field: a longer one is a broken file, and tokenizing it would take gigabytes."""

_SURROGATES = re.compile("[\udc80-\udcff]")

Row = tuple[str, Any]
Wrap = Callable[[IO[bytes]], IO[bytes]]


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """A row that cannot be used."""

    reason: str
    place: str


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read, and what to call it in places and messages."""

    path: Path
    name: str

    def sha256(self) -> str:
        """Digest of the file as it lies on the disk, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def expand(source: str) -> list[SourceFile]:
    """The files that a source names.

    Args:
      source: a path, a glob, or `wheel:NAME==VERSION/path/in/wheel`. Hub sets are fetched by `fetch_hub` first.

    Returns:
      The files, those of a glob sorted by name.

    Raises:
      ConfigError: nothing is there, or a file's ending is not known.
    """
    if any(character in source for character in "*?[") and not Path(source).exists():
        files = [SourceFile(Path(path), path) for path in sorted(glob.glob(source, recursive=True))]
        if not files:
            raise ConfigError(
                f"data source {source!r} matches no file. A glob must match at least one. "
                f"Check the path; the working directory is {Path.cwd()}."
            )
    elif source.startswith("wheel:") or not Path(source).is_file():
        from kto_jax.sources import local_path

        path = local_path(source)
        files = [SourceFile(path, path.name)]
    else:
        files = [SourceFile(Path(source), source)]
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
    if suffix == ".parquet":
        yield from _parquet(file)
        return
    with file.path.open("rb") as raw, opener(wrap(raw)) as stream:
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](stream, file.name)


def fetch_hub(source: str, path: Path) -> None:
    """Streams a Hub set into a JSONL file. Imports `datasets`, hence `torch` where it is installed: run in a worker.

    Args:
      source: `hub:org/name/split`; in place of `org/name` also a directory of data files.
      path: the file to write, atomically.

    Raises:
      ConfigError: the source is misspelt, or the Hub or the set cannot be reached.
    """
    name, _, split = source.removeprefix("hub:").rpartition("/")
    if not name or not split:
        raise ConfigError(f"data source {source!r} is not a Hub set. It is written hub:org/name/split. Name the split.")
    import datasets

    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in datasets.load_dataset(name, split=split, streaming=True):
                file.write(json.dumps(row, default=str) + "\n")
        partial.rename(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"data source {source!r} cannot be read: {type(error).__name__}: {str(error)[:300]}. "
            "A Hub set is written hub:org/name/split. Check its name and the network, or name a local file."
        ) from error


def _format(path: Path) -> tuple[str, Callable[[Any], Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    opener: Callable[[Any], Any] = io.BufferedReader
    if suffixes and suffixes[-1] in _COMPRESSED:
        opener = _COMPRESSED[suffixes.pop()]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in FORMATS or (suffix == ".parquet" and opener is not io.BufferedReader):
        raise ConfigError(
            f"data source {str(path)!r} has no known ending. Known are {', '.join(FORMATS)}, all but Parquet also with "
            ".gz or .bz2. Rename or convert the file."
        )
    return suffix, opener


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


def _json(stream: IO[bytes], name: str) -> Iterator[Row]:
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError, OSError) as error:
        raise ConfigError(
            f"{name} is not valid JSON: {str(error)[:200]}. A .json file holds one list of objects. "
            "Mend it, or write one object a line in a .jsonl file, where a broken line costs only itself."
        ) from error
    if not isinstance(rows, list):
        raise ConfigError(
            f"{name} holds {type(rows).__name__}. A .json file holds one list of objects. Write the rows as a list."
        )
    for number, fields in enumerate(rows, start=1):
        yield f"{name}:{number}", fields


def _csv(stream: IO[bytes], name: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_BYTES)
    # Bytes that are not UTF-8 become surrogates here and reject their own row below, not the file.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _csv_rows(text, name)


def _csv_rows(text: IO[str], name: str) -> Iterator[Row]:
    reader = csv.reader(text, strict=True)
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
        elif len(values) != len(header):
            yield place, Rejection(f"{len(values)} columns where the header has {len(header)}", place)
        elif any(map(_SURROGATES.search, values)):
            yield place, Rejection("invalid UTF-8", place)
        else:
            yield place, dict(zip(header, values, strict=True))


def _parquet(file: SourceFile) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    number += 1
                    place = f"{file.name}:{number}"
                    try:
                        yield place, batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError:
                        yield place, Rejection("invalid UTF-8", place)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{file.name} cannot be read as Parquet after row {number}: {str(error)[:200]}. "
            "A .parquet file must be whole. Write it again."
        ) from error
