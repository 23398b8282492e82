"""The folder in which an index is built, by one process at a time; an interrupted build is resumed.

indices/building-KEY/lock      held by the building process; the system releases it when that process ends
indices/building-KEY/index     the files so far, and progress.json with their valid sizes
indices/KEY                    the finished index, moved there by one rename
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kto_jax.config import ConfigError
from kto_jax.storage.folders import reporting_write_errors
from kto_jax.storage.locks import lock_file

_STALE_SECONDS = 86_400
"""How long an unlocked folder is kept, so that a run with the same data can resume it."""


def is_finished(final: Path) -> bool:
    """Whether there is a finished index."""
    return (final / "manifest.json").exists()


@contextlib.contextmanager
def build_folder(final: Path) -> Iterator[Path | None]:
    """Yields the folder to build an index in, and moves it to its final path when the body ends.

    Waits for other processes that build the same index.

    Args:
      final: path of the finished index. Readers see a finished index there or none.

    Yields:
      The folder, with the files of an interrupted build if there are any; None if the index is finished, perhaps by
      another process meanwhile. If the body raises a `ConfigError` the folder is removed; after any other exception it
      is kept.
    """
    if is_finished(final):
        yield None
        return
    folder = final.with_name(f"building-{final.name}")
    _remove_stale(folder)
    lock, is_locked = _lock(folder)
    # Without locks, each process needs its own folder, because two must not write to the same files; it is not resumed.
    own = folder / ("index" if is_locked else f"index-{secrets.token_hex(4)}")
    with lock:
        try:
            if is_finished(final):
                yield None
            else:
                own.mkdir(exist_ok=True)
                yield own
                _publish(own, final)
        except ConfigError:
            _remove(folder if is_locked else own)
            raise
        _remove(folder if is_locked else own)


def remove_damaged(final: Path, is_damaged: Callable[[], bool]) -> None:
    """Removes a finished index, unless another process has done so and perhaps built it again.

    Processes that have it open keep their files.

    Raises:
      ConfigError: it cannot be removed.
    """
    lock, _ = _lock(final.with_name(f"building-{final.name}"))
    with lock, reporting_write_errors(final):
        if is_damaged():
            aside = final.with_name(f"building-{final.name}") / f"damaged-{secrets.token_hex(4)}"
            os.rename(final, aside)
            shutil.rmtree(aside, ignore_errors=True)


def _publish(folder: Path, final: Path) -> None:
    """Moves a finished index to its final path; replaces a folder without a manifest there, keeps a finished index."""
    try:
        os.rename(folder, final)
    except OSError:
        if not is_finished(final):
            shutil.rmtree(final)
            os.rename(folder, final)


def _lock(folder: Path) -> tuple[IO[str], bool]:
    """The folder's lock file, opened, and whether it is locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / "lock").open("a")
        except FileNotFoundError:
            continue  # the last holder has just removed the folder
        if not _acquire(lock, folder):
            return lock, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock, True
        lock.close()


def _acquire(lock: IO[str], folder: Path) -> bool:
    without = "Each process then builds its own index, and an interrupted build is not resumed."
    try:
        return lock_file(lock, wait=False, without=without)
    except BlockingIOError:
        print(f"waiting for another run that builds the same index, in {folder}", file=sys.stderr)
        return lock_file(lock, wait=True, without=without)


def _remove_stale(own: Path) -> None:
    """Removes unlocked folders of builds that were interrupted long ago."""
    for folder in own.parent.glob("building-*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if folder == own or time.time() - newest < _STALE_SECONDS:
                continue
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _remove(folder: Path) -> None:
    # A process that waits for the lock may create a new lock file here meanwhile; it then removes the folder itself.
    shutil.rmtree(folder, ignore_errors=True)
