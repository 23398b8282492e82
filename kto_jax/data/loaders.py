"""Processes that make batches ahead of the step, in order: for data that one thread cannot make fast enough.

A loader is given a function once, then numbers of steps, one at a time, and hands back what the function makes of each.
Loader k of N makes steps k, k + N, k + 2N, …: which process makes a step has no influence on what is in it.
`multiprocessing` alone, and no pool of `concurrent.futures`: its processes must be able to ignore the signals that end
a run (the last steps still need batches), and a pool that lost one process waits for those that do.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

from kto_jax.config import ConfigError
from kto_jax.data.processes import bare_main

T = TypeVar("T")


class Loaders(Generic[T]):
    """Processes that compute `function(step)` for each step, one step ahead each; iterate to take the results in order.

    Their memory is bounded: each holds the function and one result. They touch no accelerator, end with this process
    however it ends, and leave SIGINT and SIGTERM to it.

    Args:
      function: makes a step's batch; it is pickled once for each process, so no lambda.
      steps: which steps, in order.
      num_loaders: processes, at least 1.
    """

    def __init__(self, function: Callable[[int], T], steps: Iterable[int], num_loaders: int):
        self._steps = iter(steps)
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
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
            for number in range(num_loaders):
                self._send(number, function, "at its start")
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[T]:
        """Yields the results in order.

        Raises:
          ConfigError: a loader was ended from outside.
          Exception: whatever `function` raised, in its turn, with a note of where.
        """
        asked = list(itertools.islice(self._steps, len(self._processes)))
        for number, step in enumerate(asked):
            self._send(number, step, f"before step {step}")
        number = 0
        while asked:
            step = asked.pop(0)
            result = self._receive(number, f"while it made the batch of step {step}")
            following = next(self._steps, None)
            if following is not None:
                self._send(number, following, f"before step {following}")
                asked.append(following)
            yield result
            number = (number + 1) % len(self._processes)

    def close(self) -> None:
        """Ends the processes at once; they hold nothing that could be lost."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()

    def _send(self, number: int, message: Any, moment: str) -> None:
        try:
            self._connections[number].send(message)
        except OSError:
            raise self._ended(number, moment) from None

    def _receive(self, number: int, moment: str) -> T:
        try:
            result, error, trace = self._connections[number].recv()
        except (EOFError, OSError):  # nothing else holds the other end
            raise self._ended(number, moment) from None
        if error is not None:
            error.add_note(f"in {self._processes[number].name}, {moment}:\n{trace}")
            raise error
        return result

    def _ended(self, number: int, moment: str) -> ConfigError:
        process = self._processes[number]
        process.join()
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (the system does so where memory runs out)" if code == -signal.SIGKILL else ""
        return ConfigError(
            f"{process.name} of config.data.num_loaders={len(self._processes)} {how}{hint} {moment}. Loaders must live "
            "as long as the run. Set config.data.num_loaders lower, or 0 for a thread, and run the same command again."
        )


# Everything below runs in the loaders.


def _serve(connection: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Before the function comes, whose modules import JAX: a loader must not take hold of an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Where the parent is gone, whichever way, the pipe ends.
    with contextlib.suppress(EOFError, OSError):
        function = connection.recv()
        while True:
            connection.send(_reply(function, connection.recv()))


def _reply(function: Callable[[int], Any], step: int) -> tuple[Any, BaseException | None, str]:
    try:
        return function(step), None, ""
    except Exception as error:
        trace = traceback.format_exc()
        try:
            return None, ForkingPickler.loads(ForkingPickler.dumps(error)), trace
        except Exception:  # an exception that cannot travel
            return None, RuntimeError(f"{type(error).__name__}: {error}"), trace
