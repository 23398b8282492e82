"""The file of presses: JSONL that is only ever appended to, by any number of threads and processes.

A press is on disk when `append` returns: one write of a whole line at the end of the file (O_APPEND), under a lock,
flushed (fsync). A line that a crash cut in two was never acknowledged; it is moved to a file beside, FILE.torn.
`kto_jax.data.rows.pressed` says what the lines mean, and reads them.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kto_jax.data.rows.files import SourceFile, read_rows
from kto_jax.data.rows.pressed import count
from kto_jax.storage.atomic import flush_folder
from kto_jax.storage.locks import lock_file

_BLOCK = 1 << 16


class Presses:
    """The file of presses.

    Args:
      path: the file; its folder is created with the first press.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_torn = 0
        self._lock = threading.Lock()  # An flock does not exclude the threads of one process on every file system.

    def append(self, press: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a press to the end of the file; returns it with its id and time once it is on disk.

        Raises:
          OSError: it could not be written, for example because the disk is full. The file is as it was before.
        """
        row = {"id": secrets.token_hex(8), "time": _now(), **press}
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            is_new = not self.path.exists()
            if is_new:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "a") as file:
                lock_file(file, wait=True, without="Let only one process at a time write presses.")
                self._mend(descriptor)
                _write(descriptor, line)
            if is_new:
                flush_folder(self.path.parent)
        return row

    def count(self) -> dict[str, int]:
        """How many presses of each sort count, and how many lines do not, by reason."""
        if not self.path.exists():
            return {}
        return count(read_rows(SourceFile(self.path, str(self.path))))

    def _mend(self, descriptor: int) -> None:
        """Makes the file end in a whole line: adds a missing newline, or moves a torn line to the file beside."""
        size = os.fstat(descriptor).st_size
        if not size or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        start = _last_line(descriptor, size)
        tail = os.pread(descriptor, size - start, start)
        if _is_row(tail):  # Written by an editor that does not end files in a newline.
            _write(descriptor, b"\n")
            return
        torn = self.path.with_name(f"{self.path.name}.torn")
        beside = os.open(torn, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _write(beside, tail + b"\n")
        finally:
            os.close(beside)
        os.ftruncate(descriptor, start)
        os.fsync(descriptor)
        self.num_torn += 1
        print(
            f"warning: {self.path} ended in a line of {len(tail)} bytes that was cut while it was written, and that "
            f"nobody was told is saved. It was moved to {torn}.",
            file=sys.stderr,
        )


def _write(descriptor: int, line: bytes) -> None:
    """Appends bytes and flushes them; if that fails, takes back what was written.

    Raises:
      OSError: it failed.
    """
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):  # The disk is nearly full: the next write says so.
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _last_line(descriptor: int, size: int) -> int:
    """Where the last line begins."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_row(tail: bytes) -> bool:
    try:
        return isinstance(json.loads(tail), dict)
    except ValueError:
        return False


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
