"""Files and folders that appear whole or not at all, and survive a power cut once they have appeared.

The content is written beside its final place, flushed to disk and renamed. A reader, and a process that starts after a
crash, sees the old content or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""What file systems answer that cannot flush a folder, such as mounted buckets."""


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, shared: bool = False, replace: bool = True) -> Iterator[Path]:
    """Yields a path to write a file to, and moves the file to `path` when the body ends.

    Args:
      path: where the file appears; its folder must exist.
      shared: several processes may write this file at the same time, so each needs a temporary name of its own. A
        process that is killed then leaves its temporary file; otherwise the next writer replaces it.
      replace: replace an existing file. With False the existing file stays, and what the body wrote is dropped.

    Yields:
      The temporary path. If the body raises, it is removed and `path` is left as it was.

    Raises:
      OSError: the file cannot be written, flushed or renamed.
    """
    path = Path(path)
    partial = path.with_name(_partial_name(path, shared))
    try:
        yield partial
        publish_file(partial, path, replace=replace)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder to fill, and moves it to `path` when the body ends.

    Args:
      path: where the folder appears. Missing parents are created; a folder already there is removed once the new one
        is complete. Only one process at a time may write it.

    Yields:
      The temporary folder. If the body raises, it is removed and `path` is left as it was.

    Raises:
      OSError: the folder cannot be written, flushed or renamed.
    """
    path = Path(path)
    partial = path.with_name(_partial_name(path, shared=False))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str, *, shared: bool = False) -> None:
    """Writes a UTF-8 file that a reader never sees half-written; see `new_file`.

    Raises:
      OSError: the file cannot be written.
    """
    with new_file(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Writes a JSON file that a reader never sees half-written; see `new_file`.

    Raises:
      OSError: the file cannot be written.
    """
    write_text(path, json.dumps(values, indent=2) + "\n")


def publish_file(partial: Path, path: Path, *, replace: bool = True) -> None:
    """Flushes a finished file and renames it to `path`, in the same folder or file system.

    Args:
      partial: the finished file.
      path: its final place.
      replace: as for `new_file`.
    """
    _flush(partial)
    if replace:
        os.replace(partial, path)
    else:
        try:
            os.link(partial, path)  # Unlike a rename, it fails if another process was first.
        except FileExistsError:
            pass
        except OSError:  # This file system has no hard links.
            if not path.exists():
                os.replace(partial, path)
    flush_folder(path.parent)


def publish_folder(partial: Path, path: Path) -> None:
    """Flushes a finished folder with all it contains and renames it to `path`; a folder already there is removed.

    Args:
      partial: the finished folder.
      path: its final place, on the same file system.
    """
    for folder, _, names in os.walk(partial):
        for name in names:
            _flush(Path(folder, name))
        flush_folder(Path(folder))
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _partial_name(path: Path, shared: bool) -> str:
    return f".{path.name}.{secrets.token_hex(4)}.partial" if shared else f".{path.name}.partial"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Flushes the names in a folder, where the file system can."""
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
