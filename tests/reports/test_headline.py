"""The sentence at the top of a report says what changed, by how much, and whether to trust it."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from kto_jax.reports.headline import _auc_error, headline

VERDICT = {
    "judge": "feedback", "figure": "judged desirable (share)", "before": 0.12, "after": 0.79, "low": 0.53, "high": 0.79,
    "prompts": 48, "accuracy": 0.73,
}  # fmt: skip


def test_a_judge_with_a_clear_change_is_told():
    perplexity = {"judge": "reference", "figure": "perplexity of the completions", "before": 4.6, "after": 6.8}
    assert headline([], [VERDICT, perplexity], (0, 0)) == (
        "On 48 held-out prompts, the share of completions judged desirable by the judge feedback rose from 12 % to 79 "
        "%, by 67 points (95 % interval 53 to 79). It is not chance, and the judge agrees with 73 % of held-out "
        "labels. The base model's perplexity of the texts went from 4.6 to 6.8."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"low": -0.1}, "That may be chance."), ({"prompts": 9}, "Do not rely on it yet: 9 prompts are few."),
     ({"accuracy": 0.52}, "the judge agrees with only 52 % of held-out labels"),
     ({"low": None, "high": None}, "There is no interval, so do not rely on it."),
     ({"before": 0.79, "after": 0.12, "low": -0.79, "high": -0.53},
      "fell from 79 % to 12 %, by 67 points (95 % interval 53 to 79)"),
     ({"judge": "vader", "figure": "compound", "before": 0.3, "after": 0.1, "low": -0.31, "high": -0.09},
      "the mean compound by the judge vader fell from 0.3 to 0.1, by 0.2 (95 % interval 0.09 to 0.31)")],
)  # fmt: skip
def test_what_speaks_against_it_is_said(changes, said):
    assert said in headline([], [VERDICT | changes], (0, 0))


def test_without_a_judge_the_held_out_auc_is_told_with_an_interval():
    rows = [{"step": 8, "eval_auc": 0.55, "eval_loss": 0.5}, {"step": 16, "eval_auc": 0.62, "eval_loss": 0.48}]
    told = headline(rows, [], (200, 200))
    assert told.startswith("After 16 steps, held-out AUC is 0.62 (95 % interval 0.57 to 0.67): chance would be 0.5.")
    assert "it may be chance" in headline(rows, [], (20, 20))


def test_a_run_that_held_nothing_out_says_so():
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
    assert "Nothing was held out, so nothing is known of its effect" in headline(rows, [], (0, 0))
    assert headline([], [], (0, 0)) == "No step was taken."


def test_the_error_of_an_auc_is_that_of_simulations():
    rng = np.random.default_rng(0)
    labels = np.repeat([True, False], (60, 40))
    found = [roc_auc_score(labels, rng.standard_normal(100) + 0.8 * labels) for _ in range(400)]
    assert _auc_error(float(np.mean(found)), 60, 40) == pytest.approx(np.std(found), rel=0.1)
