"""Early stopping: the held-out figures of a run so far, which step is best, and when to wait no longer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from kto_jax.config import EvaluationConfig
from kto_jax.devices import processes
from kto_jax.training.checkpoint_reading import best_step
from kto_jax.training.logs import read_metrics


class Patience:
    """Compares evaluations of one figure.

    Args:
      config: which figure, and how many evaluations to wait for a better one; 0 waits for ever.
      figures: the figure by step, of the evaluations before.
    """

    def __init__(self, config: EvaluationConfig, figures: Mapping[int, float] | None = None) -> None:
        self._metric, self._patience = config.metric, config.patience
        self._figures = dict(figures or {})

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds an evaluation; one that is not finite is never better."""
        self._figures[step] = figures[self._metric]

    @property
    def best(self) -> int | None:
        """The step with the best figure; None if no evaluation was finite."""
        finite = {step: figure for step, figure in self._figures.items() if math.isfinite(figure)}
        return best_step(finite, self._metric) if finite else None

    @property
    def is_exhausted(self) -> bool:
        """Whether the last evaluations brought no better figure."""
        return self._patience > 0 and self._num_since_best() >= self._patience

    def describe(self) -> str:
        """Why the run ends early, in one sentence."""
        best = self.best
        found = "was never finite" if best is None else f"was best after step {best} ({self._figures[best]:.4g})"
        return (
            f"stopped early after step {max(self._figures)}: {self._metric} {found}, and not better in the last "
            f"{self._num_since_best()} evaluations (config.evaluation.patience={self._patience})"
        )

    def _num_since_best(self) -> int:
        return sum(self.best is None or step > self.best for step in self._figures)


def read_patience(config: EvaluationConfig, folder: Path, last_step: int) -> Patience:
    """The evaluations of a run that is resumed, from its metrics.jsonl; the first process reads it for all.

    Args:
      config: the run's.
      folder: the run's.
      last_step: the step that it is resumed after; later rows are dropped.
    """
    rows = read_metrics(folder / "metrics.jsonl") if processes.is_first() else []
    figures = [
        (row["step"], math.nan if row[config.metric] is None else row[config.metric])
        for row in rows
        if row["step"] <= last_step and config.metric in row
    ]
    return Patience(config, dict(json.loads(processes.exchange_text(json.dumps(figures))[0])))
