"""Losses of pairs and the variants of KTO: values by hand, directions, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import losses

LN2 = math.log(2)
VARIANTS = list(losses.DPO_VARIANTS)
zero = jnp.zeros(1)


def one(x):
    return jnp.asarray(x, jnp.float32).reshape(1)


def dpo(chosen, rejected, **options):
    """The DPO loss of one pair by its two log-ratios."""
    return losses.dpo_loss(one(chosen), one(rejected), zero, zero, **options)[0]


# At the reference: exo_pair: −ln 2 − ½ (ln 0.999 + ln 0.001); ipo: (1 / 0.2)².
@pytest.mark.parametrize("variant, expected", [
    ("sigmoid", LN2), ("robust", LN2), ("hinge", 1), ("ipo", 25), ("exo_pair", 2.761231), ("nca_pair", 2 * LN2),
    ("bco_pair", 2 * LN2), ("sppo_hard", 50), ("apo_zero", 1), ("apo_down", 1),
])  # fmt: skip
def test_dpo_variants_at_policy_equal_reference(variant, expected):
    logps = jnp.linspace(-90.0, -10.0, 5)
    np.testing.assert_allclose(
        losses.dpo_loss(logps, logps - 3, logps, logps - 3, variant=variant), np.full(5, expected), rtol=1e-6
    )


# σ(1) = .731059, log σ(1) = −.313262, log σ(−1) = −1.313262; u_w = 10, u_l = 0, β = 0.1.
@pytest.mark.parametrize("options, expected", [
    ({}, 0.313262),
    ({"label_smoothing": 0.2}, 0.8 * 0.313262 + 0.2 * 1.313262),
    ({"variant": "robust", "label_smoothing": 0.2}, (0.8 * 0.313262 - 0.2 * 1.313262) / 0.6),
    ({"variant": "hinge"}, 0.0),
    ({"variant": "hinge", "beta": 0.05}, 0.5),
    ({"variant": "ipo"}, 25.0),
    ({"variant": "ipo", "chosen_lengths": one(5), "rejected_lengths": one(7)}, 9.0),
    ({"variant": "exo_pair", "label_smoothing": 0.5}, LN2 - 0.731059 * 0.313262 - 0.268941 * 1.313262),
    ({"variant": "nca_pair"}, 0.313262 + 0.5 * 1.313262 + 0.5 * LN2),
    ({"variant": "bco_pair", "running_mean": 1.0}, LN2 + 0.313262),
    ({"variant": "sppo_hard"}, 50.0),
    ({"variant": "apo_zero"}, 0.268941 + 0.5),
    ({"variant": "apo_down"}, 1.0),
    ({"f_divergence": "forward_kl", "beta": 1.0}, 0.313274),
    ({"f_divergence": "js", "beta": 1.0}, 0.405480),
    ({"f_divergence": "alpha", "beta": 0.5}, 0.315078),
    ({"f_divergence": "alpha", "alpha": 1}, 0.313262),
])  # fmt: skip
def test_dpo_by_hand(options, expected):
    assert dpo(10, 0, **options) == pytest.approx(expected, abs=2e-6)


def test_the_pairs_without_reference_by_hand():
    # odds of p = ½ are 1, of p = ¼ are ⅓: the odds ratio is 3, σ(log 3) = ¾.
    assert losses.orpo_loss(one(math.log(0.5)), one(math.log(0.25)), odds_weight=0.2)[0] == pytest.approx(
        LN2 - 0.2 * math.log(0.75)
    )
    assert losses.simpo_loss(one(-1.0), one(-2.0))[0] == pytest.approx(0.313262, abs=1e-6)
    assert losses.cpo_loss(one(-10), one(-20), one(-2), nll_weight=0.5)[0] == pytest.approx(1.313262, abs=1e-6)
    assert losses.slic_loss(one(-10), one(-9.5), one(-2))[0] == pytest.approx(1.5 + 0.2)
    assert losses.slic_loss(one(-10), one(-12), one(-2))[0] == pytest.approx(0.2)
    assert losses.bradley_terry_loss(one(3), one(1), margin=1.0, centring=0.01)[0] == pytest.approx(0.473262, abs=1e-6)


def test_odds_of_certainty_are_clamped_and_still_learn_from_the_likelihood():
    value, gradient = jax.value_and_grad(lambda c: losses.orpo_loss(c, one(-1.0))[0])(zero)
    assert jnp.isfinite(value)
    assert gradient[0] == -1


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_the_reference_a_wider_margin_lowers_every_variant(variant):
    wider = jax.grad(lambda step: dpo(step, -step, variant=variant))(0.0)
    assert wider < 0
    narrower = jax.grad(lambda step: dpo(-step, step, variant=variant))(0.0)
    assert narrower == pytest.approx(-wider)


@pytest.mark.parametrize("variant", ["sigmoid", "robust", "hinge", "bco_pair", "apo_zero"])
@pytest.mark.parametrize("f_divergence", losses.F_DIVERGENCES)
def test_monotone_variants_fall_with_the_chosen_and_rise_with_the_rejected(variant, f_divergence):
    ratios, still = jnp.linspace(-2.0, 2.0, 33), jnp.zeros(33)
    options = {"variant": variant, "f_divergence": f_divergence, "beta": 0.05}
    assert jnp.all(jnp.diff(losses.dpo_loss(ratios, still, still, still, **options)) < 0)
    assert jnp.all(jnp.diff(losses.dpo_loss(still, ratios, still, still, **options)) > 0)


@pytest.mark.parametrize("loss, num_others", [
    (losses.orpo_loss, 0), (losses.simpo_loss, 0), (losses.cpo_loss, 1), (losses.slic_loss, 1),
    (losses.bradley_terry_loss, 0),
])  # fmt: skip
def test_losses_without_reference_fall_with_the_chosen_and_rise_with_the_rejected(loss, num_others):
    logps, still = jnp.linspace(-3.4, -2.6, 17), jnp.full(17, -3.0)
    others = [still] * num_others
    assert jnp.all(jnp.diff(loss(logps, still, *others)) < 0)
    assert jnp.all(jnp.diff(loss(still, logps, *others)) > 0)


def test_bco_falls_for_desirable_and_rises_for_undesirable_completions():
    ratios = jnp.linspace(-40.0, 40.0, 81)
    for desirable, direction in ((True, -1), (False, 1)):
        for result in (
            losses.bco_loss(ratios, jnp.zeros(81), jnp.full(81, desirable), 0.3),
            losses.apo_zero_unpaired_loss(ratios, jnp.zeros(81), jnp.full(81, desirable)),
        ):
            assert jnp.all(direction * jnp.diff(result) > 0)


def test_no_gradient_flows_through_the_running_mean():
    def bco(policy):
        return jnp.sum(losses.bco_loss(policy, jnp.zeros(4), jnp.arange(4) < 2, 0.1 * jnp.mean(policy)))

    def bco_pair(policy):
        return jnp.sum(losses.dpo_loss(policy, -policy, jnp.zeros(4), jnp.zeros(4), variant="bco_pair",
                                       running_mean=0.1 * jnp.mean(policy)))  # fmt: skip

    policy = jnp.array([1.0, 2.0, 3.0, 6.0])
    expected = jax.grad(lambda p: jnp.sum(losses.bco_loss(p, jnp.zeros(4), jnp.arange(4) < 2, 0.3)))(policy)
    np.testing.assert_allclose(jax.grad(bco)(policy), expected, rtol=1e-6)
    by_hand = -0.1 * 2 * jax.nn.sigmoid(-(0.1 * policy - 0.3))
    by_hand = by_hand / 2 - 0.1 * jax.nn.sigmoid(-0.1 * policy - 0.3)
    np.testing.assert_allclose(jax.grad(bco_pair)(policy), by_hand, rtol=1e-6)


def test_the_running_mean_is_that_of_all_rewards_however_they_came():
    rewards = np.random.default_rng(0).normal(3, 2, 300).astype(np.float32)
    where = rewards > 1
    mean, count = 0.0, 0.0
    for batch, counted in zip(rewards.reshape(10, 30), where.reshape(10, 30), strict=True):
        mean, count = losses.update_running_mean(mean, count, jnp.array(batch), where=jnp.array(counted))
    assert count == where.sum()
    assert mean == pytest.approx(rewards[where].mean(), rel=1e-5)


def test_the_running_mean_ignores_what_is_masked_and_an_empty_batch():
    mean, count = losses.update_running_mean(2.0, 5.0, jnp.array([jnp.nan, jnp.inf]), where=jnp.zeros(2, bool))
    assert (mean, count) == (2, 5)
    assert losses.update_running_mean(0.0, 0.0, jnp.zeros(0))[0] == 0


def test_a_bounded_count_makes_the_running_mean_forget():
    mean, count = losses.update_running_mean(0.0, 1000.0, jnp.full(10, 1.0), max_count=100.0)
    assert count == 100
    assert mean == pytest.approx(0.1)


@pytest.mark.parametrize("options, said", [
    ({"variant": "sigmod"}, "variant='sigmod' is not a DPO variant. Choose one of sigmoid, robust"),
    ({"f_divergence": "kl"}, "f_divergence='kl' is not known. Choose one of reverse_kl"),
    ({"variant": "ipo", "label_smoothing": 0.1}, "has no meaning for variant='ipo'"),
    ({"variant": "robust", "label_smoothing": 0.5}, r"must be in \[0, 0.5\)"),
    ({"label_smoothing": -0.1}, r"must be in \[0, 1.0\)"),
])  # fmt: skip
def test_options_that_dpo_cannot_use_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        dpo(1, 0, **options)


# Variants of KTO.


def test_the_opposite_class_is_the_reference_point_without_gradient_and_clamped():
    policy, reference = jnp.array([4.0, 2.0, -1.0, -5.0, 9.0]), jnp.zeros(5)
    desirable, where = jnp.array([True, True, False, False, True]), jnp.array([True, True, True, True, False])
    function = losses.opposite_class_reference_point
    np.testing.assert_array_equal(function(policy, reference, desirable, where=where), [0, 0, 3, 3, 0])
    np.testing.assert_array_equal(function(policy, reference, desirable, where=where, clamp=False), [-3, -3, 3, 3, -3])
    np.testing.assert_array_equal(function(policy, reference, jnp.ones(5, bool)), jnp.zeros(5))
    assert not jnp.any(jax.grad(lambda p: jnp.sum(function(p, reference, desirable)))(policy))


def test_apo_zero_unpaired_is_kto_at_zero():
    assert losses.apo_zero_unpaired_loss(one(10), zero, jnp.array([True]))[0] == pytest.approx(0.268941, abs=1e-6)
    assert losses.apo_zero_unpaired_loss(one(10), zero, jnp.array([False]))[0] == pytest.approx(0.731059, abs=1e-6)


@pytest.mark.parametrize("as_printed", [False, True])
def test_the_log_utility_rewards_rejected_completions_only_as_printed(as_printed):
    ratios, still = jnp.linspace(-40.0, 40.0, 41), jnp.zeros(41)

    def loss(chosen, rejected):
        return losses.log_utility_loss(chosen, rejected, still, still, jnp.array(2.0), as_printed=as_printed)

    assert jnp.all(jnp.diff(loss(ratios, still)) < 0)
    assert jnp.all(jnp.diff(loss(still, ratios)) < 0) if as_printed else jnp.all(jnp.diff(loss(still, ratios)) > 0)


def test_no_gradient_flows_through_the_reference_point_of_the_log_utility():
    assert jax.grad(lambda z0: losses.log_utility_loss(one(3), one(1), zero, zero, z0)[0])(1.0) == 0


def test_humanline_keeps_each_token_within_its_bounds_and_clamped_tokens_teach_nothing():
    ratios = jnp.array([-3.0, -0.9, 0.0, 1.4, 2.0])
    np.testing.assert_allclose(losses.humanline_clamp(ratios), [-1, -0.9, 0, 1.4, 1.5])
    gradient = jax.grad(lambda r: jnp.sum(losses.humanline_clamp(r)))(ratios)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])
    np.testing.assert_allclose(losses.humanline_clamp(ratios, low=-0.5, high=0.5), [-0.5, -0.5, 0, 0.5, 0.5])


def test_a_completion_without_tokens_has_mean_zero():
    means = losses.mean_logps(jnp.array([-6.0, jnp.nan]), jnp.array([3, 0]))
    np.testing.assert_array_equal(means, [-2, 0])
    gradient = jax.grad(lambda x: jnp.sum(losses.sft_loss(x, jnp.array([4, 0]))))(jnp.array([-6.0, jnp.nan]))
    np.testing.assert_array_equal(gradient, [-0.25, 0])
