"""Rankings of thumbs and pairs by their rewards."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from kto_jax.evaluation.calibration import auc_interval, calibrate, rank_pairs, rank_thumbs


def test_calibrated_probabilities_have_hardly_any_error_and_overconfident_ones_do():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(4000)
    labels = rng.random(4000) < 1 / (1 + np.exp(-logits))
    good, bad = (calibrate(1 / (1 + np.exp(-scale * logits)), labels) for scale in (1, 4))
    assert good.error < 0.03 < 0.1 < bad.error
    assert good.brier < bad.brier
    assert len(good.bins) == 10 and sum(one.examples for one in good.bins) == 4000


def test_thumbs_are_right_on_their_side_of_the_reference_point():
    rewards = np.array([1.0, 0.4, -1.0, -0.3])
    found = rank_thumbs(rewards, rewards - 0.5, np.array([True, True, False, False]), "abcd")
    assert found.accuracy.value == 0.75
    assert found.auc.value == 1.0


def test_pairs_are_right_if_the_chosen_completion_is_ahead():
    found = rank_pairs(np.array([1.0, 2.0, 0.0]), np.array([0.0, 3.0, -1.0]), "abc")
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.calibration.brier == pytest.approx(np.mean([(1 / (1 + math.exp(-m)) - 1) ** 2 for m in (1, -1, 1)]))


def test_the_auc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    rewards, labels = np.round(rng.standard_normal(80), 1), rng.random(80) < 0.4
    assert auc_interval(rewards, labels, range(80)).value == pytest.approx(roc_auc_score(labels, rewards))


def test_a_perfect_auc_of_few_prompts_has_an_interval():
    rewards = np.array([3.0, 2.0, 1.0, 0.0])
    found = auc_interval(rewards, rewards > 1.5, range(4))
    assert found.value == found.high == 1 and 0.3 < found.low < 0.5


def test_the_auc_needs_both_labels():
    assert math.isnan(auc_interval(np.array([1.0, 2.0]), np.array([True, True]), "ab").value)


def test_the_interval_of_the_auc_holds_one_half_for_rewards_that_know_nothing():
    rng = np.random.default_rng(0)
    found = auc_interval(rng.standard_normal(200), rng.random(200) < 0.5, range(200))
    assert found.low < 0.5 < found.high
