"""Reports steps whose loss is not finite or far above the recent ones, and names their rows."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Collection, Mapping

from kto_jax.config import Config
from kto_jax.progress import console
from kto_jax.training.inputs import Inputs

WINDOW, _FEWEST = 50, 20
"""Recent steps that a loss is compared with, and how many there must be."""
_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation of normal values."""
_MOST_ROWS = 64


def is_spike(before: Collection[float], loss: float, deviations: float) -> bool:
    """Whether a loss is far above those before it.

    Args:
      before: losses of recent steps; with fewer than 20 nothing is a spike.
      loss: of the step.
      deviations: standard deviations above their median; 0 finds nothing.
    """
    if not deviations or len(before) < _FEWEST:
        return False
    median = statistics.median(before)
    deviation = _NORMAL * statistics.median(abs(one - median) for one in before)
    return loss - median > deviations * deviation


class UnusualSteps:
    """Compares each step with those before.

    A loss spikes if it exceeds the median of the last 50 losses by more than `watch.spike_deviations` standard
    deviations, which are estimated from the median absolute deviation: earlier spikes hardly move it.

    Args:
      config: the run.
      inputs: says which rows a step has, and where they were read.
    """

    def __init__(self, config: Config, inputs: Inputs) -> None:
        self._config, self._inputs = config, inputs
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Prints what is unusual about a step, if anything is."""
        loss, num_bad = figures["loss"], round(figures["num_bad_steps"])
        if num_bad >= self._config.max_bad_steps:
            console.print(
                f"error: {self._config.max_bad_steps} steps in a row had a non-finite loss or gradient, the last on "
                f"{self._rows(step)}. Such steps change nothing, and the newest checkpoint is finite. Look at these "
                "rows, or lower config.optimizer.learning_rate.",
                style="red",
            )
        elif num_bad:
            console.print(
                f"warning: step {step} had a non-finite loss or gradient and changed nothing ({num_bad} in a row; "
                f"config.max_bad_steps={self._config.max_bad_steps} end the run). Its rows: {self._rows(step)}",
                style="yellow",
            )
        elif self._spikes(loss):
            console.print(
                f"warning: the loss of step {step} is {loss:.4g}; the median of the {len(self._losses)} before is "
                f"{statistics.median(self._losses):.4g} (config.watch.spike_deviations="
                f"{self._config.watch.spike_deviations:g}). Its rows: {self._rows(step)}",
                style="yellow",
            )
        if math.isfinite(loss):
            self._losses.append(loss)

    def _spikes(self, loss: float) -> bool:
        return is_spike(self._losses, loss, self._config.watch.spike_deviations)

    def _rows(self, step: int) -> str:
        """Ids and places of a step's rows."""
        ids = [int(row) for row in self._inputs.schedule.step(step - 1).ids]
        shown = ", ".join(f"{row} ({self._inputs.index.place(row)})" for row in ids[:_MOST_ROWS])
        return shown + (f" and {len(ids) - _MOST_ROWS} more" if len(ids) > _MOST_ROWS else "")
