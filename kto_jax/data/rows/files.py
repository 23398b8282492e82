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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.config.packages import require
from kto_jax.data.rows.json_rows import Row, json_rows, jsonl_rows
from kto_jax.data.rows.tables import columnar_rows, csv_rows, excel_rows
from kto_jax.storage import hub
from kto_jax.storage.atomic import new_file
from kto_jax.storage.bucket import is_bucket
from kto_jax.storage.bucket_copies import copy_files, find_files
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
      source: a path, a glob or a directory, also in a bucket (gs://, s3://); `wheel:NAME==VERSION/path/in/wheel`,
        `tfds:name/split` or `tfds-dir:path:split`. Hub sets are fetched by `fetch_hub` first.

    Returns:
      The files, those of a glob or a directory sorted by name.

    Raises:
      ConfigError: there is no such file, or its ending is not known.
      TransientError: the bucket does not answer.
    """
    if source.startswith(("tfds:", "tfds-dir:")):
        from kto_jax.data.rows.tfds import tfds_file

        files = [SourceFile(tfds_file(source), source)]
    elif is_bucket(source):
        files = _in_bucket(source)
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
            f"data source {source!r} does not exist. It is a file, a directory or a glob, also in a bucket (gs://, "
            "s3://), hub:org/name/split, tfds:name/split, tfds-dir:path:split or wheel:NAME==VERSION/path/in/wheel. "
            f"Check the path; relative paths start at {Path.cwd()}."
        )
    for file in files:
        _format(file.path, file.name)
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
    suffix, opener = _format(file.path, file.name)
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


def _in_bucket(url: str) -> list[SourceFile]:
    """The files that a URL names, copied to the cache."""
    found = find_files(url)
    names = sorted(found.versions)
    if found.folder is not None and names:
        names = _readable(names, found.folder, url)
    if not names:
        raise ConfigError(
            f"data source {url!r} does not exist. It must name a file, a folder or a glob that matches a file. Check "
            f"the name (`gcloud storage ls {url}` or `aws s3 ls {url}` lists it)."
        )
    for name in names:
        _format(Path(name), f"{found.bucket.url}/{name}")
    folder = copy_files(found.bucket, {name: found.versions[name] for name in names}, url)
    return [SourceFile(folder / name, f"{found.bucket.url}/{name}") for name in names]


def _in_directory(directory: Path) -> list[SourceFile]:
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    found = [directory / name for name in _readable(names, "", str(directory))]
    return [SourceFile(path, str(path)) for path in sorted(found)]


def _readable(names: Iterable[str], below: str, place: str) -> list[str]:
    """The files of a folder that can be read, but hidden ones and the metadata of `datasets`.

    Args:
      names: of all files.
      below: what all names begin with, which is not looked at.
      place: the folder, for messages.
    """
    found, unread = [], collections.Counter[str]()
    for name in names:
        path = Path(name.removeprefix(below))
        if any(part.startswith((".", "_")) for part in path.parts) or path.name in _HUB_METADATA:
            continue
        if _known(path):
            found.append(name)
        else:
            unread[path.suffix or "no ending"] += 1
    if not found:
        raise ConfigError(
            f"data source {place!r} is a directory without a readable file. Read are {', '.join(FORMATS)}. "
            "Check the path, or rename or convert the files."
        )
    if unread:
        endings = ", ".join(f"{count} × {ending}" for ending, count in unread.most_common())
        print(f"warning: {place}: {unread.total()} files of unknown ending are not read: {endings}", file=sys.stderr)
    return found


def _format(path: Path, name: str) -> tuple[str, Callable[[Any], Any]]:
    known = _known(path)
    if known is None:
        raise ConfigError(
            f"data source {name!r} has no known ending. Known are {', '.join(FORMATS)}, the first five also with "
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
