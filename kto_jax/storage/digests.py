"""SHA-256 digests of files, remembered so that a file that has not changed is hashed once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from kto_jax.storage import atomic
from kto_jax.storage.folders import cache_directory

_SETTLED_SECONDS = 2.0
"""A file written more recently than this may be written again within one tick of the clock, its times unchanged."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered while the file is unchanged.

    A file counts as unchanged if its path, size, times of change and inode are the same; it is then not read again. The
    digests are kept in the cache directory, one small file each. If the cache cannot be written, every call reads the
    file.

    Args:
      path: an existing file.

    Returns:
      The digest in hexadecimal.

    Raises:
      OSError: the file cannot be read.
    """
    resolved = Path(path).resolve()
    before = _identity(resolved)
    key = hashlib.sha256(repr((os.fspath(resolved), *before)).encode(errors="surrogateescape")).hexdigest()
    remembered = cache_directory() / "digests" / key[:2] / key[2:]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if _SHA256.fullmatch(digest := remembered.read_text("ascii")):
            return digest
    started = time.time()
    digest = sha256(resolved)
    if _identity(resolved) == before and started - max(before[1:3]) / 1e9 > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):
            remembered.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(remembered, digest, shared=True)
    return digest


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal; always reads the file."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Size in bytes, times of the last change of content and of anything (nanoseconds), and inode.

    Programs that copy files may set the first time back; nothing can set the second.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
