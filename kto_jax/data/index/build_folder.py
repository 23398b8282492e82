"""Where an index is built: by one process at a time, which goes on where a killed one stopped.

indices/building-KEY/lock      held by the process that builds; the system lets go of it however the process ends
indices/building-KEY/index     what is written so far, and progress.json, which says how far that is
indices/building-KEY/copy      a finished index on its way from the store
indices/KEY                    the finished index, renamed there as a whole
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
from kto_jax.data.index.shared_store import IndexStore

_STALE_SECONDS = 86_400
"""A folder that no process holds is kept so long, to be gone on with by a run of the same data."""


def provide(
    final: Path, build: Callable[[Path], None], *, key: str, store: IndexStore | None = None, builds: bool = True
) -> None:
    """Sees to it that a finished index lies at its place: it is there already, or copied from the store, or built.

    Args:
      final: where the finished index will lie.
      build: writes the index into a folder, going on with what a killed build left there.
      key: of the index.
      store: where finished indices are kept for all hosts.
      builds: whether this process builds what the store lacks, and publishes it; the others then wait for it. Without
        a store every host builds.

    Raises:
      ConfigError: the store cannot be used, holds something broken, or the process that builds has ended; or what
        `build` raises.
    """

    def is_here() -> bool:
        return (final / "manifest.json").exists()

    if store is not None and not builds and not is_here():
        # Not under the lock: on this host, it may be the lock of the process that builds.
        store.wait(key, is_here)
    publishes = store is not None and builds and store.find(key) is None
    with store.signs_of_building(key) if store is not None and publishes else contextlib.nullcontext():
        with build_folder(final) if not is_here() else contextlib.nullcontext() as folder:
            if folder is not None:
                _copy_or_build(folder, final, build, key, store)
        if store is not None and publishes and store.find(key) is None:
            store.publish(key, final)


def _copy_or_build(
    folder: Path, final: Path, build: Callable[[Path], None], key: str, store: IndexStore | None
) -> None:
    contents = store.find(key) if store is not None else None
    if store is None or contents is None:
        build(folder)
    else:
        folder = folder.with_name(folder.name.replace("index", "copy"))
        store.copy(key, contents, folder)
    publish(folder, final)


@contextlib.contextmanager
def build_folder(final: Path) -> Iterator[Path | None]:
    """Waits for other processes that build the same index, and gives the folder to build it in.

    Args:
      final: where the finished index will lie.

    Yields:
      The folder, with what a killed build left in it, to be published by `publish`; None if the index was finished
      meanwhile. Where the body is refused by a `ConfigError` nothing is left; after any other exception what was
      written stays.
    """
    folder = final.with_name(f"building-{final.name}")
    _remove_stale(folder)
    lock, is_locked = _lock(folder)
    # Without locks, two processes must not write to the same files; what one leaves is then not gone on with.
    own = folder / ("index" if is_locked else f"index-{secrets.token_hex(4)}")
    with lock:
        try:
            if (final / "manifest.json").exists():
                yield None
            else:
                own.mkdir(exist_ok=True)
                yield own
        except ConfigError:
            _remove(folder if is_locked else own)
            raise
        _remove(folder if is_locked else own)


def publish(folder: Path, final: Path) -> None:
    """Moves a finished index to its place, as a whole: a reader sees a finished one or none.

    Args:
      folder: the finished index.
      final: its place; what lies there without a manifest is replaced, a finished index stays.
    """
    try:
        os.rename(folder, final)
    except OSError:
        if not (final / "manifest.json").exists():
            shutil.rmtree(final)
            os.rename(folder, final)


def _lock(folder: Path) -> tuple[IO[str], bool]:
    """The folder's lock file, opened, and whether it is held: some file systems have no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / "lock").open("a")
        except FileNotFoundError:
            continue  # the last holder removed the folder just now
        if not _acquire(lock, folder):
            return lock, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock, True
        lock.close()


def _acquire(lock: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run that builds the same index, in {folder}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _remove_stale(own: Path) -> None:
    """Removes the folders of builds that were killed long ago and that no process holds."""
    for folder in own.parent.glob("building-*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if folder == own or time.time() - newest < _STALE_SECONDS:
                continue
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _remove(folder: Path) -> None:
    # A process that waits for the lock may put a new lock file here meanwhile; it then removes the folder itself.
    shutil.rmtree(folder, ignore_errors=True)
