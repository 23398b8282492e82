"""The annotations that `evaluate` writes give the same figures in AlpacaEval's own package."""

import json

import numpy as np
import pytest

from kto_jax.evaluation.alpaca_eval import write_annotations
from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.contest import hold_contest
from kto_jax.evaluation.pair_judges import ScoreJudge
from kto_jax.rollouts.prompts import PromptRow

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]


@pytest.mark.parametrize("seed", range(3))
def test_win_rate_and_standard_error_are_those_of_alpaca_eval(tmp_path, seed):
    """Wins, losses, ties, and verdicts that could not be read."""
    chance = np.random.default_rng(seed)

    def answers():
        texts = ["x" * int(size) for size in chance.integers(0, 5, 200)]
        return [Answer(f"p{i}", text, PromptRow(f"p{i}", {}, "").key) for i, text in enumerate(texts)]

    ours, theirs = answers(), answers()
    judge = ScoreJudge("length", lambda these: [len(one.text) or None for one in these])
    judged = hold_contest(("a", "b"), None, ours, theirs, [judge]).judged[0]
    write_annotations(tmp_path / "annotations.json", [judged.judgement], ours, theirs, ("a", "b"))
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert {row["preference"] for row in rows} == {1.0, 1.5, 2.0, None}
    from alpaca_eval import metrics

    found = metrics.get_winrate(rows)
    assert found["win_rate"] == pytest.approx(100 * judged.win.rate.value, abs=1e-9)
    assert found["standard_error"] == pytest.approx(100 * judged.win.standard_error, abs=1e-9)
    assert found["n_total"] == sum(row["preference"] is not None for row in rows) < 200
