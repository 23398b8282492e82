"""Losses of tokens: PPO, GRPO and the advantages they train on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import losses


def row(*numbers):
    return jnp.array([numbers], jnp.float32)


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.0, 2.0, -2.0, -2.0), (1.1, 2.0, -2.2, -2.2), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0), (1.5, -2.0, 3.0, 3.0), (0.5, -2.0, 1.6, 0.0), (1.5, 0.0, 0.0, 0.0),
])  # fmt: skip
def test_ppo_clips_what_has_gone_far_enough_and_nothing_else(ratio, advantage, loss, gradient):
    logps = jnp.log(row(ratio))
    function = jax.value_and_grad(lambda x: losses.ppo_clip_loss(x, row(0.0), row(advantage))[0, 0])
    value, slope = function(logps)
    assert value == pytest.approx(loss, abs=1e-6)
    assert slope[0, 0] == pytest.approx(gradient, abs=1e-6)


def test_the_offline_ratio_clip_is_a_quarter_to_four():
    options = {"clip_low": 0.75, "clip_high": 3.0}
    result = losses.ppo_clip_loss(jnp.log(row(0.1, 10.0)), row(0.0, 0.0), row(-1.0, 1.0), **options)
    np.testing.assert_allclose(result, row(0.25, -4.0), rtol=1e-6)


# old value 0, return 1: inside the clip; beyond it, where the error stays that of 0.2; and gone the wrong way.
@pytest.mark.parametrize("value, loss, gradient", [(0.1, 0.405, -0.9), (0.9, 0.32, 0.0), (-0.9, 1.805, -1.9)])
def test_the_value_loss_by_hand(value, loss, gradient):
    function = jax.value_and_grad(lambda v: losses.ppo_value_loss(v, row(0.0), row(1.0))[0, 0])
    got, slope = function(row(value))
    assert got == pytest.approx(loss)
    assert slope[0, 0] == pytest.approx(gradient)


def test_advantages_by_hand():
    # Errors are 0 + 2 − 1 = 1, 0 + 3 − 2 = 1, 10 − 3 = 7; traces of ½ make 1 + ½ (1 + ½ 7) = 3.25.
    advantages = losses.generalized_advantages(row(0, 0, 10), row(1, 2, 3), trace=0.5)
    np.testing.assert_allclose(advantages, row(3.25, 4.5, 7.0))


def test_discount_and_trace_have_different_effects():
    rewards, estimates = row(0, 10), row(1, 2)
    np.testing.assert_allclose(losses.generalized_advantages(rewards, estimates, discount=0.5, trace=0.0), row(0, 8))
    np.testing.assert_allclose(losses.generalized_advantages(rewards, estimates, discount=0.5, trace=1.0), row(4, 8))


def test_with_a_full_trace_the_advantage_is_what_is_still_to_come_less_the_value():
    rng = np.random.default_rng(0)
    rewards, estimates = rng.normal(size=(2, 3, 9)).astype(np.float32)
    to_come = np.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    advantages = losses.generalized_advantages(jnp.array(rewards), jnp.array(estimates), trace=1.0)
    np.testing.assert_allclose(advantages, to_come - estimates, rtol=1e-5, atol=1e-5)


def test_masked_tokens_are_skipped():
    where = jnp.array([[False, True, False, True, True, False]])
    rewards, estimates = row(9, 1, 9, 2, 3, 9), row(9, 4, 9, 5, 6, 9)
    advantages = losses.generalized_advantages(rewards, estimates, where=where)
    alone = losses.generalized_advantages(row(1, 2, 3), row(4, 5, 6))
    np.testing.assert_allclose(advantages[where], alone[0], rtol=1e-6)
    assert not jnp.any(advantages[~where])


@pytest.mark.parametrize("function", [
    lambda x: losses.generalized_advantages(x, 2 * x), losses.group_relative_advantages,
    losses.leave_one_out_advantages,
])  # fmt: skip
def test_advantages_have_no_gradient(function):
    assert not jnp.any(jax.grad(lambda x: jnp.sum(jnp.square(function(x))))(row(1, 2, 4)))


def test_equal_rewards_in_a_group_teach_nothing():
    rewards = jnp.full((2, 4), 3.0)
    assert not jnp.any(losses.group_relative_advantages(rewards))
    assert not jnp.any(losses.leave_one_out_advantages(rewards))


def test_advantages_do_not_depend_on_other_groups_and_sum_to_zero():
    rewards = jnp.array(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    for function in (losses.group_relative_advantages, losses.leave_one_out_advantages):
        np.testing.assert_allclose(function(rewards)[1], function(rewards[1]), rtol=1e-6)
        np.testing.assert_allclose(jnp.sum(function(rewards), axis=1), jnp.zeros(3), atol=1e-5)


def test_a_group_of_one_has_no_others():
    with pytest.raises(ValueError, match="Sample at least 2"):
        losses.leave_one_out_advantages(jnp.zeros((4, 1)))


def test_the_kl_estimate_is_zero_at_the_reference_and_positive_elsewhere():
    logps = jnp.asarray(np.linspace(-6.0, 0.0, 31, dtype=np.float32))[None]  # the middle is -3 in every compiler
    kl = losses.k3_kl(logps, jnp.full((1, 31), -3.0))
    assert kl[0, 15] == 0
    assert jnp.all(jnp.diff(kl[0, :16]) < 0)
    assert jnp.all(jnp.diff(kl[0, 15:]) > 0)


@pytest.mark.parametrize("ahead, pull", [(-1e4, -1), (-25.0, -1), (-3.0, -1), (3.0, 1), (19.0, 1), (25.0, 0), (1e4, 0)])
def test_the_kl_estimate_never_pushes_the_policy_away_from_the_reference(ahead, pull):
    gradient = jax.grad(lambda logps: losses.k3_kl(logps, row(ahead))[0, 0])(row(0.0))
    assert -jnp.sign(gradient[0, 0]) == pull


def test_the_kl_estimate_is_unbiased_for_the_policys_own_tokens():
    policy, reference = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.0, 1.0, 2.0], [1.0, 0.5, 0.0]))
    estimate = jnp.sum(jnp.exp(policy) * losses.k3_kl(policy, reference))
    assert estimate == pytest.approx(float(jnp.sum(jnp.exp(policy) * (policy - reference))), rel=1e-5)


def test_grpo_is_the_surrogate_and_the_weighted_kl_with_one_advantage_per_completion():
    rng = np.random.default_rng(1)
    logps, old, reference = (jnp.array(-rng.gamma(1.0, 1.0, (4, 6)), jnp.float32) for _ in range(3))
    advantages = jnp.array([1.0, -1.0, 0.5, 0.0])
    result = losses.grpo_loss(logps, old, reference, advantages, kl_weight=0.3)
    spread = jnp.broadcast_to(advantages[:, None], (4, 6))
    expected = losses.ppo_clip_loss(logps, old, spread) + 0.3 * losses.k3_kl(logps, reference)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_policy_losses_fall_as_tokens_of_positive_advantage_get_likelier():
    logps, old = jnp.linspace(-0.2, 0.15, 8)[None], jnp.zeros((1, 8))
    for loss in (losses.ppo_clip_loss, lambda *x: losses.grpo_loss(x[0], x[1], x[1], x[2])):
        for sign in (1.0, -1.0):
            assert jnp.all(sign * jnp.diff(loss(logps, old, jnp.full((1, 8), sign))[0]) < 0)
