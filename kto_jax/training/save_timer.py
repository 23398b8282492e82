"""Time-based checkpoints, at steps on which all processes agree."""

from __future__ import annotations

import time
from collections.abc import Callable

from kto_jax.devices import processes

_MAX_STEPS_BETWEEN_CHECKS = 100
"""Maximum number of steps between questions, because the pace may change."""


class SaveTimer:
    """Decides when enough minutes have passed since the last save.

    The first process decides by its clock and sends its decision to the others. Asking after every step would cost each
    process a message per step, so the answer also says after how many steps to ask again: as many as fit into the
    remaining time at the pace since the last save, but no more than were taken since then, and at most 100.

    Args:
      minutes: between saves; 0 for never.
      clock: returns seconds from an arbitrary origin.
      ask: returns the first process's number on all processes.
    """

    def __init__(
        self,
        minutes: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        ask: Callable[[int], int] = processes.broadcast_int,
    ) -> None:
        self._period = 60 * minutes
        self._clock = clock
        self._ask = ask
        self._since = clock()
        self._since_step: int | None = None
        self._next_check = 0

    def restart(self, step: int) -> None:
        """Restarts the timer at this step; called after every save."""
        self._since, self._since_step = self._clock(), step
        self._next_check = step + 1

    def due(self, step: int) -> bool:
        """Whether to save after this step; all processes must call it for the same steps."""
        if not self._period or step < self._next_check:
            return False
        steps_left = self._ask(self._steps_until_check(step))
        self._next_check = step + steps_left
        return steps_left == 0

    def _steps_until_check(self, step: int) -> int:
        """0 if a save is due; only the first process's answer counts."""
        if self._since_step is None:
            self._since_step = step - 1
        elapsed = self._clock() - self._since
        if elapsed >= self._period:
            return 0
        taken = max(step - self._since_step, 1)
        share_left = (self._period - elapsed) / max(elapsed, 1e-9)
        return max(min(int(taken * min(share_left, 1)), _MAX_STEPS_BETWEEN_CHECKS), 1)
