"""Raw rows from JSONL, JSON, CSV, TSV, Excel, Parquet and Arrow files, plain or compressed, each with its place."""

from __future__ import annotations

import bz2
import collections
import dataclasses
import functools
import glob
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.config.packages import require
from kto_jax.data.rows.json_rows import Row, json_rows, jsonl_rows
from kto_jax.data.rows.tables import columnar_rows, csv_rows, excel_rows
from kto_jax.storage import hub
from kto_jax.storage.atomic import new_file
from kto_jax.storage.digests import file_digest
from kto_jax.storage.fetch import local_path

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".feather")
_COLUMNAR = (".parquet", ".arrow", ".feather")
_COMPRESSED_BY_THEMSELVES = (".xlsx", *_COLUMNAR)
"""Formats that their libraries read from the file itself."""
_CHUNK_BYTES = 1 << 20
_HUB_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files of a directory written by `datasets` that hold no rows."""

Wrap = Callable[[IO[bytes]], IO[bytes]]


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read, and its name in places and messages."""

    path: Path
    name: str

    def sha256(self) -> str:
        """Digest of the file's bytes on disk, in hexadecimal."""
        return file_digest(self.path)


def expand(source: str) -> list[SourceFile]:
    """The files that a source names.

    Args:
      source: a path, a glob, a directory, `wheel:NAME==VERSION/path/in/wheel`, `tfds:name/split` or
        `tfds-dir:path:split`. Hub sets are fetched by `fetch_hub` first.

    Returns:
      The files, those of a glob or a directory sorted by name.

    Raises:
      ConfigError: there is no such file, or its ending is not known.
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
      wrap: called with the opened file, for example to show progress.

    Yields:
      `(place, fields)`; the fields are a `Rejection` where the row could not be read.

    Raises:
      ConfigError: the whole file cannot be read: a JSON or Parquet file that is broken.
    """
    suffix, opener = _format(file.path)
    if suffix in _COLUMNAR or opener is _open_zst:
        require("pyarrow", f"data source {file.name!r}", "convert the file to .jsonl")
    if suffix in _COLUMNAR:
        yield from columnar_rows(file.path, file.name, suffix)
    elif suffix == ".xlsx":
        yield from excel_rows(file.path, file.name)
    else:
        # Unbuffered, so that the lines of a pipe are read as they come.
        with file.path.open("rb", buffering=0) as raw, opener(wrap(raw)) as stream:
            yield from _READERS[suffix](stream, file.name)


_READERS: dict[str, Callable[[Any, str], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": functools.partial(csv_rows, separator="\t"),
}


def fetch_hub(source: str, path: Path) -> None:
    """Streams a Hub set into a JSONL file. Imports `datasets`, hence `torch` where it is installed: run in a worker.

    Args:
      source: `hub:org/name/split`, also with `:config` and `@REVISION`; in place of `org/name` also a directory of data
        files.
      path: the file to write, atomically.

    Raises:
      ConfigError: the source is misspelt, or there is no such set.
      TransientError: the Hub cannot be reached.
    """
    found = hub.parse(source)
    name, _, split = source.removeprefix("hub:").rpartition("/")  # of a directory
    options = {"name": found.config or None, "revision": found.revision or None} if found else {}
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
            "A Hub set is written hub:org/name/split, or hub:org/name:config/split if it has several configurations. "
            "Check its name and the network, or name a local file."
        ) from error


def _in_directory(directory: Path) -> list[SourceFile]:
    """Every file below a directory that can be read, but hidden ones and the metadata of `datasets`."""
    found, unread = [], collections.Counter[str]()
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        if not path.is_file() or hidden or path.name in _HUB_METADATA:
            continue
        if _known(path):
            found.append(SourceFile(path, str(path)))
        else:
            unread[path.suffix or "no ending"] += 1
    if not found:
        raise ConfigError(
            f"data source {str(directory)!r} is a directory without a readable file. Read are {', '.join(FORMATS)}. "
            "Check the path, or rename or convert the files."
        )
    if unread:
        endings = ", ".join(f"{count} × {ending}" for ending, count in unread.most_common())
        print(
            f"warning: {directory}: {unread.total()} files of unknown ending are not read: {endings}", file=sys.stderr
        )
    return found


def _format(path: Path) -> tuple[str, Callable[[Any], Any]]:
    known = _known(path)
    if known is None:
        raise ConfigError(
            f"data source {str(path)!r} has no known ending. Known are {', '.join(FORMATS)}, the first five also with "
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
    if suffix not in FORMATS or (suffix in _COMPRESSED_BY_THEMSELVES and opener is not None):
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
