"""Processes that make batches ahead of the step, in order: for data that one thread cannot make fast enough.

A loader is given a function once, then numbers of steps, one at a time, and hands back what the function makes of each.
Loader k of N makes steps k, k + N, k + 2N, …: which process makes a step has no influence on what is in it.
`multiprocessing` alone, and no pool of `concurrent.futures`: its processes must be able to ignore the signals that end
a run (the last steps still need batches), and a pool that lost one process waits for those that do.
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
"""Bytes; where each array begins."""


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
      function: makes a step's batch, in one background thread; with loaders in their processes, to which it is pickled
        (a schedule's `batch` can be, a lambda cannot).
      steps: which steps, in order.
      finish: what is left to do in this process, in the background thread: placing the batch on devices.
      num_loaders: processes that make batches, each one ahead; 0 for none.
      depth: how many finished results are kept ahead.

    Yields:
      The results in order. What either function raises is raised here, in its turn.
    """
    with contextlib.ExitStack() as stack:
        batches: Iterator[Any] = map(function, steps)
        if num_loaders:
            batches = iter(stack.enter_context(contextlib.closing(Loaders(function, steps, num_loaders))))
        end = object()

        def make() -> Any:
            batch = next(batches, end)
            return end if batch is end else finish(batch)

        # The thread ends before the loaders: it may be waiting for one.
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
    """Processes that compute `function(step)` for each step; iterate to take the results in order.

    Each is two steps ahead at most, so that it works on the second while the first is taken. Their memory is bounded:
    each holds the function, a result, and two to be taken. They touch no accelerator, end with this process however it
    ends, and leave SIGINT and SIGTERM to it.

    Args:
      function: makes a step's batch; it is pickled once for each process, so no lambda.
      steps: which steps, in order.
      num_loaders: processes, at least 1.
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
          Exception: whatever `function` raised, in its turn, with a note of where.
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
        """Ends the processes at once; they hold nothing that could be lost."""
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
        with contextlib.suppress(OSError):  # a process that has ended is found where its result is to be taken
            self._connections[number].send(message)

    def _receive(self, number: int, turn: int, moment: str) -> T:
        try:
            head, places = self._connections[number].recv()
        except (EOFError, OSError):  # nothing else holds the other end
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
        hint = " (the system does so where memory runs out)" if code == -signal.SIGKILL else ""
        kind = TransientError if code < 0 else ConfigError
        return kind(
            f"{process.name} of config.data.num_loaders={len(self._processes)} {how}{hint} {moment}. Loaders must live "
            "as long as the run. Set config.data.num_loaders lower, or 0 for a thread, and run the same command again."
        )


class _SharedMemory:
    """A file that two processes map, and that grows with what is written to it.

    It has no name, so nothing is left of it when both have ended, whichever way.
    """

    def __init__(self, file: int):
        self.file = file
        self._map: mmap.mmap | None = None

    def write(self, buffers: list[memoryview]) -> list[tuple[int, int]]:
        """Writes all, in place of what was there; returns where each begins, and its bytes."""
        ends = list(itertools.accumulate(_aligned(len(buffer)) for buffer in buffers))
        if buffers and ends[-1] > os.fstat(self.file).st_size:
            os.ftruncate(self.file, ends[-1])
        places = [(end - _aligned(len(buffer)), len(buffer)) for end, buffer in zip(ends, buffers, strict=True)]
        for (start, size), buffer in zip(places, buffers, strict=True):
            if size:
                self._mapped(start + size)[start : start + size] = buffer
        return places

    def read(self, places: list[tuple[int, int]]) -> list[memoryview]:
        """A copy of what was written at each place: the next batch will lie there too."""
        size = max((start + size for start, size in places), default=0)
        copy = np.empty(size, np.uint8)
        if size:
            copy[:] = np.frombuffer(self._mapped(size), np.uint8, size)
        return [copy.data[start : start + size] for start, size in places]

    def close(self) -> None:
        """Lets go of the file and of the memory."""
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
    # Before the function comes, whose modules import JAX: a loader must not take hold of an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Where the parent is gone, whichever way, the pipe ends.
    with contextlib.suppress(EOFError, OSError):
        memories = [_SharedMemory(recv_handle(connection)) for _ in range(_AHEAD)]
        function = connection.recv()
        for memory in itertools.cycle(memories):
            buffers: list[memoryview] = []
            head = _pickled(_reply(function, connection.recv()), buffers)
            connection.send((head, memory.write(buffers)))


def _pickled(value: Any, buffers: list[memoryview]) -> bytes:
    """A value without its arrays, which are added to `buffers`."""
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
        except Exception:  # an exception that cannot travel
            return None, RuntimeError(f"{type(error).__name__}: {error}"), trace
