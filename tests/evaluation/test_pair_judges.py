"""Every kind of judge gives a verdict for each pair, or says what is wrong."""

import math
import textwrap

import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.pair_judges import open_judges
from kto_jax.judges.judges import fit_feedback_judge

OURS = [Answer("p", "short", "p"), Answer("q", "the answer is 7", "q", {"answer": "7"}), Answer("r", "one two", "r")]
THEIRS = [Answer("p", "a b c d e", "p"), Answer("q", "8", "q", {"answer": "7"}), Answer("r", "three four", "r")]


def verdicts(name, **options):
    with open_judges([name], **options) as (judge,):
        return judge.judge(OURS, THEIRS)


def write(tmp_path, text):
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_checker_lets_the_completion_that_keeps_its_rule_win():
    found = verdicts("max_words(4)")
    assert found.verdicts.shares.tolist() == [1, 0.5, 0.5]
    assert found.verdicts.shown_second is None
    assert [side.tolist() for side in found.scores] == [[1, 1, 1], [0, 1, 1]]


def test_a_checker_sees_the_columns_of_the_prompts_and_may_not_apply():
    shares = verdicts("equals_number('answer')").verdicts.shares
    assert shares[1] == 1 and math.isnan(shares[0]) and math.isnan(shares[2])


def test_scores_within_the_tie_are_a_tie():
    with open_judges(["vader"], tie=3) as (judge,):
        assert judge.judge(OURS, THEIRS).verdicts.shares.tolist() == [0.5] * 3


def test_a_function_of_pairs_is_asked_in_both_orders(tmp_path):
    path = write(
        tmp_path,
        """
        def compare(prompts, a, b):
            return [None if p == "r" else 1 for p in prompts]
        """,
    )
    found = verdicts(f"{path}:compare").verdicts
    assert found.shown_first[:2].tolist() == [1, 1] and found.shown_second[:2].tolist() == [0, 0]
    assert found.is_read.tolist() == [True, True, False]


def test_an_object_as_of_scikit_learn_scores_texts(tmp_path):
    path = write(
        tmp_path,
        """
        class Long:
            def predict_proba(self, texts):
                return [[1 - len(text) / 100, len(text) / 100] for text in texts]
        judge = Long()
        """,
    )
    assert verdicts(f"{path}:judge").verdicts.shares.tolist() == [0, 1, 0]


def test_a_reward_function_is_a_judge(tmp_path):
    path = write(tmp_path, "def brevity(completions, **columns): return [-len(text) for text in completions]")
    assert verdicts(f"{path}:brevity").verdicts.shares.tolist() == [1, 0, 1]


def test_the_feedback_judge_is_fitted_on_the_run_and_says_how_good_it_is():
    texts = ["lovely film"] * 6 + ["dreadful film"] * 6

    def fit():
        return fit_feedback_judge(texts, [True] * 6 + [False] * 6, list(range(12)))

    with open_judges(["feedback"], feedback=fit) as (judge,):
        found = judge.judge([Answer("p", "lovely", "p")], [Answer("p", "dreadful", "p")])
    assert found.verdicts.shares.tolist() == [1]
    assert "fitted on 12 labelled completions" in found.note


@pytest.mark.parametrize(
    ("code", "message"),
    [("def compare(prompts, a, b): return [2] * len(a)", "returned 2. It must return a number from 0"),
     ("def compare(prompts, a, b): return []", "returned 0 verdicts for 3 pairs"),
     ("def compare(prompts, a, b): raise KeyError('x')", "raised KeyError: 'x'"),
     ("class compare:\n  predict = staticmethod(lambda texts: [1])", r"returned an array of shape \(1,\) for 3 texts"),
     ("class compare:\n  predict = staticmethod(lambda texts: 1 / 0)", "raised ZeroDivisionError in predict"),
     ("other = 1", "--judge='.*own.py:compare' cannot be imported")],
)  # fmt: skip
def test_a_judge_that_answers_nonsense_is_named(tmp_path, code, message):
    path = write(tmp_path, code)
    with pytest.raises(ConfigError, match=message):
        verdicts(f"{path}:compare")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["max_word(3)"], "--judge='max_word\\(3\\)' is no reward"), (["feedback"], "--run is not given"),
     (["vader", "vader"], "names a judge twice")],
)  # fmt: skip
def test_unknown_judges_are_refused(names, message):
    with pytest.raises(ConfigError, match=message), open_judges(names):
        pass


def test_scores_are_arrays_of_floats():
    assert all(side.dtype == np.float64 for side in verdicts("min_words(2)").scores)
