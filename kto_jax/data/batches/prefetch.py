"""Prefetches batches in order, in a thread or in loader processes if one thread is too slow.

A loader receives a function once, then step numbers one at a time, and returns the function's results. Loader k of N
makes steps k, k + N, k + 2N, …; the contents of a step do not depend on its process. This uses plain `multiprocessing`,
not a pool of `concurrent.futures`: loaders must ignore the signals that end a run (the last steps still need batches),
and a pool that lost one process would wait for processes that ignore signals.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import io
import itertools
import mmap
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from typing import Any, Generic, TypeVar

import numpy as np

from kto_jax.config import ConfigError, TransientError
from kto_jax.data.workers import bare_main

T = TypeVar("T")
_AHEAD = 2
_ALIGNMENT = 64
"""Alignment of each array, in bytes."""


def prefetch(
    function: Callable[[int], Any],
    steps: Iterable[int],
    *,
    finish: Callable[[Any], Any] = lambda batch: batch,
    num_loaders: int = 0,
    depth: int = 2,
) -> Iterator[Any]:
    """Computes `finish(function(step))` for each step ahead of time.

    Args:
      function: makes a step's batch, in one background thread, or in the loaders' processes. It is then pickled, so it
        cannot be a lambda; a schedule's `batch` works.
      steps: the steps, in order.
      finish: runs in this process, in the background thread: places the batch on devices.
      num_loaders: number of loader processes; 0 for none.
      depth: number of finished results that are kept ahead.

    Yields:
      The results in order. Exceptions of either function are raised at the step's turn.
    """
    with contextlib.ExitStack() as stack:
        batches: Iterator[Any] = map(function, steps)
        if num_loaders:
            batches = iter(stack.enter_context(contextlib.closing(Loaders(function, steps, num_loaders))))
        end = object()

        def make() -> Any:
            batch = next(batches, end)
            return end if batch is end else finish(batch)

        # The thread must end before the loaders, because it may be waiting for one.
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch"))
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            while True:
                while len(pending) < depth:
                    pending.append(thread.submit(make))
                if (result := pending.popleft().result()) is end:
                    return
                yield result
        finally:
            for future in pending:
                future.cancel()


class Loaders(Generic[T]):
    """Processes that compute `function(step)` for each step; iterate to get the results in order.

    Each is at most two steps ahead, so that it computes the second while the first is consumed. Memory is bounded: each
    holds the function, one result, and two unconsumed ones. Loaders use no accelerator, end when this process ends,
    even if it is killed, and ignore SIGINT and SIGTERM.

    Args:
      function: makes a step's batch; it is pickled once for each process, so it cannot be a lambda.
      steps: the steps, in order.
      num_loaders: number of processes, at least 1.
    """

    def __init__(self, function: Callable[[int], T], steps: Iterable[int], num_loaders: int):
        self._steps = iter(steps)
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._memories: list[tuple[_SharedMemory, ...]] = []
        atexit.register(self.close)
        context = multiprocessing.get_context("spawn")
        try:
            for number in range(num_loaders):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), name=f"loader {number}", daemon=True)
                with bare_main(), theirs:
                    process.start()
                self._processes.append(process)
                self._connections.append(ours)
                self._memories.append(tuple(_SharedMemory(_anonymous_file()) for _ in range(_AHEAD)))
            for number in range(num_loaders):
                self._start(number, function)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[T]:
        """Yields the results in order.

        Raises:
          TransientError: a loader was killed.
          ConfigError: a loader ended in another way.
          Exception: raised by `function`, at the step's turn, with a note of the process and step.
        """
        asked: collections.deque[int] = collections.deque()
        num_asked = num_taken = 0
        while True:
            while len(asked) < _AHEAD * len(self._processes) and (step := next(self._steps, None)) is not None:
                self._send(num_asked % len(self._processes), step)
                asked.append(step)
                num_asked += 1
            if not asked:
                return
            round_, number = divmod(num_taken, len(self._processes))
            result = self._receive(number, round_ % _AHEAD, f"while it made the batch of step {asked.popleft()}")
            num_taken += 1
            yield result

    def close(self) -> None:
        """Kills the processes; they hold nothing that could be lost."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        for memory in itertools.chain(*self._memories):
            memory.close()

    def _start(self, number: int, function: Callable[[int], T]) -> None:
        with contextlib.suppress(OSError):
            for memory in self._memories[number]:
                send_handle(self._connections[number], memory.file, self._processes[number].pid)
        self._send(number, function)

    def _send(self, number: int, message: Any) -> None:
        with contextlib.suppress(OSError):  # `_receive` reports a process that has ended
            self._connections[number].send(message)

    def _receive(self, number: int, turn: int, moment: str) -> T:
        try:
            head, places = self._connections[number].recv()
        except (EOFError, OSError):  # the loader's end is closed: it has ended
            raise self._ended(number, moment) from None
        result, error, trace = ForkingPickler.loads(head, buffers=self._memories[number][turn].read(places))
        if error is not None:
            error.add_note(f"in {self._processes[number].name}, {moment}:\n{trace}")
            raise error
        return result

    def _ended(self, number: int, moment: str) -> ConfigError | TransientError:
        process = self._processes[number]
        process.join()
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (the system does so when memory runs out)" if code == -signal.SIGKILL else ""
        kind = TransientError if code < 0 else ConfigError
        return kind(
            f"{process.name} of config.data.num_loaders={len(self._processes)} {how}{hint} {moment}. Loaders must live "
            "as long as the run. Set config.data.num_loaders lower, or 0 for a thread, and run the same command again."
        )


class _SharedMemory:
    """A file that two processes map, and that grows as needed.

    It has no name, so nothing remains when both processes have ended, even if they were killed.
    """

    def __init__(self, file: int):
        self.file = file
        self._map: mmap.mmap | None = None

    def write(self, buffers: list[memoryview]) -> list[tuple[int, int]]:
        """Overwrites the file with the buffers; returns each one's offset and size in bytes."""
        ends = list(itertools.accumulate(_aligned(len(buffer)) for buffer in buffers))
        if buffers and ends[-1] > os.fstat(self.file).st_size:
            os.ftruncate(self.file, ends[-1])
        places = [(end - _aligned(len(buffer)), len(buffer)) for end, buffer in zip(ends, buffers, strict=True)]
        for (start, size), buffer in zip(places, buffers, strict=True):
            if size:
                self._mapped(start + size)[start : start + size] = buffer
        return places

    def read(self, places: list[tuple[int, int]]) -> list[memoryview]:
        """A copy of the bytes at each place, because the next batch overwrites them."""
        size = max((start + size for start, size in places), default=0)
        copy = np.empty(size, np.uint8)
        if size:
            copy[:] = np.frombuffer(self._mapped(size), np.uint8, size)
        return [copy.data[start : start + size] for start, size in places]

    def close(self) -> None:
        """Closes the file and its mapping."""
        if self._map is not None:
            self._map.close()
        os.close(self.file)

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self.file, 0)
        return self._map


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("kto_jax batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# Everything below runs in the loaders.


def _serve(connection: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Set before receiving the function, whose modules import JAX: a loader must not claim an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # If the parent has ended, even if it was killed, the pipe is closed.
    with contextlib.suppress(EOFError, OSError):
        memories = [_SharedMemory(recv_handle(connection)) for _ in range(_AHEAD)]
        function = connection.recv()
        for memory in itertools.cycle(memories):
            buffers: list[memoryview] = []
            head = _pickled(_reply(function, connection.recv()), buffers)
            connection.send((head, memory.write(buffers)))


def _pickled(value: Any, buffers: list[memoryview]) -> bytes:
    """A pickled value without its arrays, which are appended to `buffers`."""
    head = io.BytesIO()
    ForkingPickler(head, 5, True, lambda buffer: buffers.append(buffer.raw())).dump(value)
    return head.getvalue()


def _reply(function: Callable[[int], Any], step: int) -> tuple[Any, BaseException | None, str]:
    try:
        return function(step), None, ""
    except Exception as error:
        trace = traceback.format_exc()
        try:
            return None, ForkingPickler.loads(ForkingPickler.dumps(error)), trace
        except Exception:  # an exception that cannot be pickled
            return None, RuntimeError(f"{type(error).__name__}: {error}"), trace
