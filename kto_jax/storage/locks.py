"""Locks on files, which the operating system releases however a process ends. Some file systems have none."""

from __future__ import annotations

import fcntl
import sys
from typing import IO


def lock_file(file: IO[str], *, wait: bool, without: str) -> bool:
    """Locks an open file for this process alone.

    Args:
      file: the lock is held until it is closed.
      wait: wait for another process that holds the lock, instead of raising.
      without: what it means if the file system has no locks; printed as a warning in that case.

    Returns:
      Whether the lock is held: False on a file system without locks (ENOLCK, ENOTSUP, ENOSYS, ...), such as some
      network mounts and mounted buckets.

    Raises:
      BlockingIOError: another process holds it, and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        print(f"warning: {file.name} cannot be locked ({error}). {without}", file=sys.stderr)
        return False
    return True
