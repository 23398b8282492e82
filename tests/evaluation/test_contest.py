"""The outcome of a contest in one sentence."""

import json
import math

import numpy as np
import pytest

from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.contest import conclusion, hold_contest, to_json
from kto_jax.evaluation.pair_judges import Judgement, ScoreJudge
from kto_jax.evaluation.texts import describe_texts
from kto_jax.evaluation.verdicts import Verdicts


class Fixed:
    """A judge with given verdicts."""

    name = "fixed"

    def __init__(self, first, second=None):
        self.first, self.second = np.asarray(first, float), None if second is None else np.asarray(second, float)

    def judge(self, evaluated, baseline):
        return Judgement("fixed", Verdicts([one.key for one in evaluated], self.first, self.second))


def contest(first, second=None, longer=0):
    count = len(first)
    rng = np.random.default_rng(0)
    ours = [
        Answer(f"p{i}", "x" * int(20 + longer * (first[i] == 1) + rng.integers(0, 9)), str(i)) for i in range(count)
    ]
    theirs = [Answer(f"p{i}", "x" * int(20 + rng.integers(0, 9)), str(i)) for i in range(count)]
    return hold_contest(("new", "old"), 7, ours, theirs, [Fixed(first, second)])


def sentence(*arguments, **options):
    held = contest(*arguments, **options)
    return conclusion("fixed", held.evaluated, held.baseline, held.judged[0])


def test_a_clear_win_is_called_one():
    assert sentence([1] * 30 + [0] * 10) == (
        "new wins 75 % of 40 pairs against old by fixed (95 % interval 60 to 88 %): clearly better."
    )
    assert sentence([0] * 30 + [1] * 10).endswith("clearly worse.")


@pytest.mark.parametrize(
    ("first", "second", "ending"),
    [([1, 0] * 20, None, "the two cannot be told apart."),
     ([1] * 9, None, "do not rely on it yet, because 9 prompts are few."),
     ([1] * 30 + [math.nan] * 10, None, "because 10 of 40 verdicts could not be read."),
     ([1] * 40, [0] * 20 + [1] * 20, "because the judge contradicts itself in 50 % of the pairs."),
     ([math.nan] * 3, None, "gave no verdict that could be read on new and old.")],
)  # fmt: skip
def test_what_speaks_against_it_is_said(first, second, ending):
    assert sentence(first, second).endswith(ending)


def test_a_win_that_length_explains_is_not_called_clear():
    assert "length may explain it" in sentence([1] * 28 + [0] * 12, longer=200)


def test_figures_become_json_without_numbers_that_are_not_finite():
    figures = to_json(contest([1] * 30 + [math.nan] * 2))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    (judge,) = figures["judges"]
    assert (judge["judge"], judge["wins"], judge["failures"], judge["pairs"]) == ("fixed", 30, 2, 30)
    assert judge["at_equal_lengths"]["undefined"] == "all pairs have the same verdict"
    assert figures["step"] == 7 and figures["prompts"] == 32


def test_mean_scores_have_an_interval_of_their_difference():
    ours, theirs = ([Answer(f"p{i}", side * (i + 2), str(i)) for i in range(30)] for side in ("aa", "b"))
    held = hold_contest(
        ("new", "old"), None, ours, theirs, [ScoreJudge("n", lambda found: [len(x.text) for x in found])]
    )
    mean, other, difference = held.judged[0].scores
    assert mean - other == pytest.approx(difference.value) and difference.low > 0


def test_cut_completions_are_counted_in_a_note():
    ours = [Answer("p", "x", "p", ended=False), Answer("q", "x", "q")]
    held = hold_contest(("new", "old"), None, ours, [Answer("p", "x", "p"), Answer("q", "x", "q")], [Fixed([1, 0])])
    assert "1 of 2 completions of new and 0 of old were cut" in held.notes[0]


def test_texts_are_described_by_length_diversity_and_loops():
    found = describe_texts(["a b c d " * 3, "a b", "a b", ""])
    assert found["words"] == 16 / 4 and found["empty"] == 0.25 and found["duplicates"] == 0.5
    assert found["loops"] == 0.25
    assert found["distinct pairs"] == 4 / 13  # ab, bc, cd, da of 11 + 1 + 1
    assert math.isnan(describe_texts([])["words"])
