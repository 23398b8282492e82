"""The folders that kto_jax keeps files in: its cache, and scratch space for the life of one command."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kto_jax.config import ConfigError


def cache_directory() -> Path:
    """Where fetched and indexed files are kept: $KTO_JAX_CACHE, else ~/.cache/kto_jax."""
    return Path(os.environ.get("KTO_JAX_CACHE") or "~/.cache/kto_jax").expanduser()


def cache_folder(*names: str) -> Path:
    """A folder inside the cache, created if it is missing.

    Args:
      *names: its path below `cache_directory()`.

    Raises:
      ConfigError: it cannot be created.
    """
    folder = cache_directory().joinpath(*names)
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def free_bytes(folder: os.PathLike[str]) -> int | None:
    """Bytes that can still be written in a folder; None if that is unknown, as in a bucket."""
    try:
        return None if "://" in str(folder) else shutil.disk_usage(folder).free
    except OSError:
        return None


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write in the cache into a refusal that says what to do.

    Args:
      path: what the body writes.

    Raises:
      ConfigError: the body raised an OSError: no permission, no space left, a file in place of a folder.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error}. The cache {cache_directory()} must be a folder that this user may "
            "write to, with space left. Free some space, or set KTO_JAX_CACHE to another folder."
        ) from error


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a temporary folder that is removed when the body ends.

    Raises:
      ConfigError: no temporary folder can be created. Errors of the body are not changed.
    """
    try:
        scratch = tempfile.TemporaryDirectory(prefix="kto_jax-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"no temporary folder can be created: {error}. One must be writable and have space left. Free some space, "
            "or set TMPDIR to another folder."
        ) from error
    with scratch as name:
        yield Path(name)
