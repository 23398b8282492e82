"""Notice of preemption: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

# Exit codes: a launch script restarts a run that ends with PREEMPTED, and no other.
PREEMPTED = 75
INTERRUPTED = 130


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """SIGTERM ends the process with PREEMPTED: for all around the steps, which is begun again or gone on with."""
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(PREEMPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class Preemption:
    """Remembers a signal until the loop can act on it; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._signal: int | None = None
        # With several processes JAX's own service receives the SIGTERM and agrees on a step among them; nothing agrees
        # on a Ctrl-C, which ends them as they are.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._former = {number: signal.signal(number, self._remember) for number in numbers}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def requested(self, step: int) -> bool:
        """Whether the run should save and end after this step; the same answer on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def stop_listening(self) -> None:
        """Gives the signals back to whoever had them: from here on they end the process."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What to end the process with after a requested stop."""
        return INTERRUPTED if self._signal == signal.SIGINT else PREEMPTED
