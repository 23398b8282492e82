"""Early stopping: which step is best, and when a run waits no longer."""

import json
import math

import pytest

from kto_jax.config import EvaluationConfig
from kto_jax.training.patience import Patience, read_patience


def after(*figures, metric="eval_loss", patience=2):
    """What patience is left after evaluations at steps 1, 2, ..."""
    found = Patience(EvaluationConfig(metric=metric, patience=patience))
    for step, figure in enumerate(figures, start=1):
        found.add(step, {metric: figure, "eval_z0": 9.0})
    return found


@pytest.mark.parametrize("figures, metric, best, ends", [
    ((), "eval_loss", None, False),
    ((0.5, 0.4, 0.3), "eval_loss", 3, False),
    ((0.3, 0.4), "eval_loss", 1, False),
    ((0.3, 0.4, 0.35), "eval_loss", 1, True),
    ((0.3, 0.4, 0.3), "eval_loss", 1, True),
    ((0.3, 0.4, 0.35), "eval_auc", 2, False),
    ((0.4, 0.3, 0.35), "eval_margin", 1, True),
    ((0.3, math.nan, math.nan), "eval_loss", 1, True),
    ((math.nan, math.nan), "eval_loss", None, True),
])  # fmt: skip
def test_the_best_step_and_whether_the_run_ends(figures, metric, best, ends):
    found = after(*figures, metric=metric)
    assert (found.best, found.is_exhausted) == (best, ends)


def test_no_patience_never_ends_a_run():
    assert not after(0.1, 0.2, 0.3, 0.4, patience=0).is_exhausted


def test_why_a_run_ended_is_reported_with_its_figures():
    assert after(0.3, 0.4, 0.5).describe() == (
        "stopped early after step 3: eval_loss was best after step 1 (0.3), and not better in the last 2 evaluations "
        "(config.evaluation.patience=2)"
    )


def test_a_resumed_run_counts_the_evaluations_up_to_its_checkpoint(tmp_path):
    rows = [(1, 0.3), (2, None), (3, 0.5), (4, 0.1)]
    lines = [json.dumps({"step": step, "loss": 1.0, "eval_loss": figure}) for step, figure in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps({"step": 2, "loss": 1.0}), *lines[2:]]))
    config = EvaluationConfig(patience=2)
    assert read_patience(config, tmp_path, 3).is_exhausted
    assert not read_patience(config, tmp_path, 4).is_exhausted
    assert read_patience(config, tmp_path, 0).best is None
