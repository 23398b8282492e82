"""What a reader of a report should be warned of, and at which steps."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kto_jax.reports.charts import is_number, series
from kto_jax.training.unusual import WINDOW, is_spike

_SATURATED = 0.5
_WORSE = 0.05
"""How much the held-out loss may exceed its best, as a share of it."""
_MOST_STEPS = 8


def find_warnings(rows: Sequence[Mapping[str, Any]], deviations: float) -> tuple[list[str], list[int]]:
    """Sentences on what was unusual about a run's steps, and the steps that its curves mark.

    Args:
      rows: metrics of each step, in order.
      deviations: `watch.spike_deviations` of the run.
    """
    bad = [row["step"] for row in rows if is_number(row.get("num_bad_steps")) and row["num_bad_steps"] > 0]
    spikes = _spikes(rows, deviations)
    found = []
    if bad:
        found.append(f"The loss or gradient was not finite at {_listed(bad)}; these steps changed nothing.")
    if spikes:
        found.append(f"The loss was far above those before it at {_listed(spikes)}: look at the rows named in the log.")
    steps, held_out = series(rows, "eval_loss")
    if len(steps) > 1:
        best = held_out[0].argmin()
        if held_out[0, -1] - held_out[0, best] > _WORSE * abs(held_out[0, best]):
            found.append(
                f"The held-out loss was lowest at step {steps[best]:.0f} ({held_out[0, best]:.3g}) and rose to "
                f"{held_out[0, -1]:.3g}: the policy overfits. Export that step, or train for fewer."
            )
    steps, saturated = series(rows, "saturated")
    if len(steps) and (share := float(saturated[0, -max(1, len(steps) // 10) :].mean())) > _SATURATED:
        found.append(
            f"{100 * share:.0f} % of the examples of the last steps were saturated: they teach hardly anything more."
        )
    return found, sorted({*bad, *spikes})


def _spikes(rows: Sequence[Mapping[str, Any]], deviations: float) -> list[int]:
    before: collections.deque[float] = collections.deque(maxlen=WINDOW)
    found = []
    for row in rows:
        loss = row.get("loss")
        if not is_number(loss) or not math.isfinite(loss):
            continue
        if is_spike(before, loss, deviations):
            found.append(row["step"])
        before.append(loss)
    return found


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:_MOST_STEPS]))
    return f"step{'s' * (len(steps) > 1)} {shown}" + (
        f" and {len(steps) - _MOST_STEPS} more" * (len(steps) > _MOST_STEPS)
    )
