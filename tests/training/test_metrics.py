import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.training import metrics as metrics

everything = jnp.ones(200, bool)


def rewards_with_ties(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.array(np.round(rng.normal(size=200), 1), jnp.float32), jnp.array(rng.random(200) < 0.3)


def test_auc_equals_scikit_learn_with_ties():
    from sklearn.metrics import roc_auc_score  # takes seconds, of every worker that collects this file

    rewards, desirable = rewards_with_ties()
    expected = roc_auc_score(np.asarray(desirable), np.asarray(rewards))
    assert metrics.auc(rewards, desirable, everything) == pytest.approx(expected, abs=1e-6)


def test_auc_counts_only_what_counts():
    rewards, desirable = rewards_with_ties()
    where = jnp.arange(200) < 120
    sliced = metrics.auc(rewards[:120], desirable[:120], where[:120])
    assert metrics.auc(rewards, desirable, where) == pytest.approx(float(sliced), abs=1e-6)


def test_auc_of_many_examples_does_not_overflow():
    rewards = jnp.arange(120_000, dtype=jnp.float32)
    assert metrics.auc(rewards, rewards >= 60_000, jnp.ones(120_000, bool)) == 1


def test_auc_of_one_class_is_nan():
    assert jnp.isnan(metrics.auc(jnp.ones(200), everything, everything))


def test_standard_error_is_that_of_the_sample():
    rewards, where = rewards_with_ties()
    values = np.asarray(rewards)[np.asarray(where)]
    expected = values.std(ddof=1) / np.sqrt(len(values))
    assert metrics.standard_error(rewards, where) == pytest.approx(expected, rel=1e-5)
    assert metrics.standard_error(rewards, jnp.arange(200) == 3) == 0


def test_figures_of_a_batch_by_hand():
    rewards = jnp.array([2.0, 0.5, -1.0, 9.0, 100.0])
    desirable = jnp.array([True, True, False, False, True])
    where = jnp.array([True, True, True, True, False])
    figures = metrics.class_metrics(rewards, desirable, where)
    assert figures["rewards_desirable"] == 1.25
    assert figures["rewards_undesirable"] == 4.0
    assert figures["margin"] == -2.75
    assert figures["auc"] == 0.5  # both beat -1, neither beats 9
    assert metrics.accuracy(rewards - 1, desirable, where) == 0.5  # 2 is above 1, and -1 below it
    assert metrics.saturated(rewards - 1, where) == 0.25  # only 9 is more than 3.64 from 1


def test_an_absent_class_has_no_mean_and_no_margin():
    figures = metrics.class_metrics(jnp.ones(3), jnp.ones(3, bool), jnp.ones(3, bool))
    assert figures["rewards_desirable"] == 1
    assert jnp.isnan(figures["rewards_undesirable"])
    assert jnp.isnan(figures["margin"])


def test_accuracy_of_pairs_is_the_share_won_by_the_chosen_one():
    rewards = jnp.array([[2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 9.0, 0.0]])
    where = jnp.array([[True, True, True, True], [True, True, False, False]])
    assert metrics.pair_accuracy(rewards, where) == pytest.approx(1 / 3)  # a tie is not won
