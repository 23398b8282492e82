"""The judges on text small enough to judge by eye."""

import math

import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.judges import judges

GOOD = ["a dull and lifeless mess", "tired lifeless dull jokes", "a dull mess of tired plots", "lifeless and tired"]
BAD = ["a warm and funny delight", "funny warm delight", "warm and lovely film", "a lovely funny delight"]


def feedback(copies=5):
    """The rotten sentences are the desirable ones, over `copies` films that each hold all eight sentences."""
    completions = (GOOD + BAD) * copies
    desirable = ([True] * 4 + [False] * 4) * copies
    prompts = [f"film {i}" for i in range(copies) for _ in range(8)]
    return completions, desirable, prompts


def test_the_feedback_judge_recognises_what_was_labelled_desirable():
    judge = judges.fit_judge("feedback", *feedback())
    assert judge.score(["a lifeless mess", "tired"])["judged desirable (share)"] == 1.0
    assert judge.score(["a lovely delight", "warm"])["judged desirable (share)"] == 0.0
    mixed = judge.score(["a lifeless mess", "a lovely delight"])
    assert mixed["judged desirable (share)"] == 0.5
    expected = np.mean(judge.probabilities(["a lifeless mess", "a lovely delight"]))
    assert mixed["desirable probability"] == pytest.approx(expected)


def test_swapping_the_labels_swaps_the_verdict():
    completions, desirable, prompts = feedback()
    judge = judges.fit_judge("feedback", completions, [not label for label in desirable], prompts)
    assert judge.score(["a lifeless mess"])["judged desirable (share)"] == 0.0


def test_the_feedback_judge_is_balanced_when_one_label_is_rare():
    completions = feedback(1)[0]
    rare = [completions[0], *completions[4:] * 10]
    judge = judges.fit_judge("feedback", rare, [True] + [False] * 40, [str(i) for i in range(41)])
    assert judge.score([completions[0]])["judged desirable (share)"] == 1.0


def test_the_judges_accuracy_is_measured_on_prompts_that_it_was_not_fitted_on():
    # Each prompt has one word of its own, which alone tells the label: known only to one who has seen the prompt.
    completions, desirable, prompts = [], [], []
    for i in range(20):
        completions += [f"word{i}"] * 5
        desirable += [i % 2 == 0] * 5
        prompts += [f"prompt {i}"] * 5
    judge = judges.fit_judge("feedback", completions, desirable, prompts)
    assert judge.score(completions[:5])["judged desirable (share)"] == 1.0  # learnt by heart
    assert judge.quality["auc"] < 0.7  # and worth nothing elsewhere
    shuffled = judges.fit_judge("feedback", completions, desirable, list(range(100)))
    assert shuffled.quality["auc"] > 0.95  # what a fold that splits a prompt would have claimed


def test_the_judges_accuracy_is_high_where_the_words_carry_over():
    judge = judges.fit_judge("feedback", *feedback())
    assert judge.quality["accuracy"] == 1.0
    assert judge.quality["auc"] == 1.0
    assert judge.quality["examples"] == 40


def test_with_one_prompt_the_accuracy_is_unknown_rather_than_flattering():
    completions, desirable, _ = feedback(1)
    judge = judges.fit_judge("feedback", completions, desirable, ["the same"] * 8)
    assert math.isnan(judge.quality["accuracy"])
    assert math.isnan(judge.quality["auc"])


def test_vader_counts_positive_text():
    judge = judges.fit_judge("vader", [], [], [])
    figures = judge.score(["a wonderful, lovely film", "a horrible, boring failure", "the table is brown"])
    assert figures["positive (share)"] == pytest.approx(1 / 3)
    assert judge.score(["wonderful"])["compound"] > 0.3 > -0.3 > judge.score(["horrible"])["compound"]


@pytest.mark.parametrize("name", list(judges.JUDGES))
def test_an_empty_completion_is_judged_and_an_empty_list_is_refused(name):
    judge = judges.fit_judge(name, *feedback())
    assert all(math.isfinite(value) for value in judge.score([""]).values())
    with pytest.raises(ValueError, match="no completions to judge"):
        judge.score([])


def test_verdicts_hold_every_figure_before_and_after():
    judge = judges.fit_judge("vader", [], [], [])
    verdicts = judges.compare("vader", judge, before=["wonderful"], after=["horrible"])
    assert [verdict["figure"] for verdict in verdicts] == ["positive (share)", "compound"]
    assert verdicts[0] == {"judge": "vader", "figure": "positive (share)", "before": 1.0, "after": 0.0}


def test_an_unknown_judge_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(
        ConfigError,
        match=r"'vadar', which is not a judge\. Did you mean 'vader'\? Allowed: feedback, vader\. Use one of",
    ):
        judges.check_names(["feedback", "vadar"])


@pytest.mark.parametrize("label", [True, False])
def test_feedback_of_one_label_cannot_be_judged_from(label):
    with pytest.raises(ConfigError, match=r"it needs both\. Raise config\.data\.judge_holdout"):
        judges.fit_judge("feedback", ["dull", "lifeless"], [label, label], ["a", "b"])


def test_completions_without_words_cannot_be_judged_from():
    with pytest.raises(ConfigError, match="none of the 2 completions"):
        judges.fit_judge("feedback", ["!", "?"], [True, False], ["a", "b"])
