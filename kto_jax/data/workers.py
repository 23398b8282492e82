"""Spawned processes that import neither the parent's main module nor JAX.

A process takes seconds to start and to import transformers. Inside `keep_workers`, pools that are closed leave their
processes to those that are opened later.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from kto_jax.config import TransientError


class Workers:
    """A pool of spawned processes. They end when this process ends, even if it is killed.

    Args:
      num_workers: maximum number of processes; they are started as work arrives.
      start: module-level function that each process calls once with the arguments; None for none.
      *arguments: arguments of `start`; they are pickled.
    """

    def __init__(self, num_workers: int, start: Callable[..., None] | None = None, *arguments: Any):
        self._num_workers, self._begin = num_workers, (start, arguments)
        self._pool = (_kept or {}).get(num_workers) or ProcessPoolExecutor(
            num_workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=self._begin
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Ends the workers.

        Raises:
          TransientError: the body waited for a worker that was killed.
        """
        if _kept is not None:
            if error is None and _kept.setdefault(self._num_workers, self._pool) is self._pool:
                return
            if _kept.get(self._num_workers) is self._pool:
                del _kept[self._num_workers]
        self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise TransientError(
                "a worker process was killed (the system does so when memory runs out). Workers must live until their "
                "work is done. Run the same command again, which resumes; if it recurs, lower config.data.num_workers."
            ) from error

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Runs a module-level function in a worker."""
        with bare_main():
            return self._pool.submit(_call, self._begin, function, *args)


_kept: dict[int, ProcessPoolExecutor] | None = None
"""Pools without an owner, by their number of processes; None outside `keep_workers`."""


@contextlib.contextmanager
def keep_workers() -> Iterator[None]:
    """Keeps the processes of pools that are closed inside, for pools of as many processes that are opened later."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        pools, _kept = _kept, None
        for pool in pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def bare_main() -> Iterator[None]:
    """Hides the main module while a process starts: spawn would import it again, including JAX."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# Everything below runs in the workers.

_begun: tuple[Any, tuple[Any, ...]] | None = None
"""The start that this process made last, and its arguments."""


def _start(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _make_start((start, arguments))


def _call(begin: tuple[Any, tuple[Any, ...]], function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function in a process that has made its pool's own start."""
    if begin != _begun:
        _make_start(begin)
    return function(*args)


def _make_start(begin: tuple[Any, tuple[Any, ...]]) -> None:
    global _begun
    start, arguments = begin
    if start is not None:
        start(*arguments)
    _begun = begin


def _end_with_parent() -> None:
    """Ends this worker once its parent has ended: a killed parent cannot, and the worker would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
