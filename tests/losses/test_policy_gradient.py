"""The token-level policy gradient against NumPy in float64, and how its settings are related."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import losses

SETTINGS = {
    "grpo": {},
    "clip higher": {"clip_high": 0.28},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "gspo, wide": {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"surrogate": "cispo", "clip_high": 4.0},
    "cispo, tight": {"surrogate": "cispo", "clip_high": 0.1},
    "dual clip": {"dual_clip": 1.2, "clip_low": 0.5},
}


def inputs(num=40, length=7, spread=0.4):
    rng = np.random.default_rng(0)
    old = -rng.gamma(1.5, 1.0, (num, length))
    where = np.arange(length) < rng.integers(0, length + 1, num)[:, None]
    return old + rng.normal(0, spread, old.shape), old, rng.normal(0, 1, num), where


def by_hand(
    logps, old, advantages, where, *, ratio="token", surrogate="clip", clip_low=0.2, clip_high=0.2, dual_clip=np.inf
):
    """Losses, and the gradient of their sum by logps."""
    values, gradients = np.zeros_like(logps), np.zeros_like(logps)
    for i in range(len(logps)):
        tokens = np.flatnonzero(where[i])
        logs = (logps - old)[i, tokens]
        if ratio == "sequence" and len(tokens):
            logs = np.full(len(tokens), logs.mean())
        for token, log in zip(tokens, logs, strict=True):
            rho, a = np.exp(log), advantages[i]
            # How the log-ratio of this token moves with each log-probability.
            moves = np.full(len(tokens), 1 / len(tokens)) if ratio == "sequence" else (tokens == token).astype(float)
            if surrogate == "cispo":
                values[i, token] = -min(rho, 1 + clip_high) * a * logps[i, token]
                gradients[i, token] += -min(rho, 1 + clip_high) * a
            elif a < 0 and max(rho, 1 - clip_low) > dual_clip:
                values[i, token] = -dual_clip * a
            elif rho * a <= min(max(rho, 1 - clip_low), 1 + clip_high) * a:
                values[i, token] = -rho * a
                gradients[i, tokens] += -rho * a * moves
            else:
                values[i, token] = -min(max(rho, 1 - clip_low), 1 + clip_high) * a
    return values, gradients


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
def test_losses_and_gradients_are_those_computed_by_hand(name, dtype, tolerance):
    logps, old, advantages, where = inputs()
    expected, expected_gradient = by_hand(logps, old, advantages, where, **SETTINGS[name])
    clipped = np.mean((expected_gradient == 0) & where)
    assert name == "cispo" or name == "cispo, tight" or 0.05 < clipped < 0.95
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(x, dtype) for x in (logps, old, advantages)]
        loss = lambda x: losses.policy_gradient_loss(x, *arrays[1:], where=jnp.asarray(where), **SETTINGS[name])  # noqa: E731
        gradient = jax.grad(lambda x: jnp.sum(loss(x)))(arrays[0])
        np.testing.assert_allclose(loss(arrays[0]), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def gradient_of(logps, old, advantages, where, **settings):
    with jax.enable_x64(True):
        logps, old, advantages, where = (jnp.asarray(x) for x in (logps, old, advantages, where))
        total = lambda x: jnp.sum(losses.policy_gradient_loss(x, old, advantages, where=where, **settings))  # noqa: E731
        return np.asarray(jax.grad(total)(logps))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_clip_acts_where_the_gradient_is_0_or_the_weight_is_capped(name):
    logps, old, advantages, where = inputs()
    settings = SETTINGS[name]
    found = losses.clipped_tokens(*map(jnp.asarray, (logps, old, advantages)), where=jnp.asarray(where), **settings)
    if settings.get("surrogate") == "cispo":
        expected = where & (np.exp(logps - old) > 1 + settings["clip_high"])
    elif settings.get("ratio") == "sequence":
        mean = np.sum(np.where(where, logps - old, 0), 1, keepdims=True) / np.maximum(where.sum(1, keepdims=True), 1)
        a, rho = advantages[:, None], np.exp(mean)
        expected = where & ((a > 0) & (rho > 1 + settings["clip_high"]) | (a < 0) & (rho < 1 - settings["clip_low"]))
    else:
        expected = where & (by_hand(logps, old, advantages, where, **settings)[1] == 0)
    np.testing.assert_array_equal(found, expected)
    assert name.startswith("cispo") or expected.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_on_policy_every_setting_is_reinforce(name):
    logps, _, advantages, where = inputs()
    np.testing.assert_allclose(
        gradient_of(logps, logps, advantages, where, **SETTINGS[name]),
        np.where(where, -advantages[:, None], 0),
        atol=1e-12,
    )


def test_of_completions_of_one_token_the_sequence_ratio_is_the_token_ratio():
    logps, old, advantages, _ = inputs()
    one = np.zeros(logps.shape, bool)
    one[:, 2] = True
    np.testing.assert_allclose(
        gradient_of(logps, old, advantages, one, ratio="sequence"), gradient_of(logps, old, advantages, one), atol=1e-12
    )


def test_below_its_cap_cispo_has_the_gradient_of_the_unclipped_surrogate():
    logps, old, advantages, where = inputs(spread=0.1)
    expected = np.where(where, -np.exp(logps - old) * advantages[:, None], 0)
    np.testing.assert_allclose(
        gradient_of(logps, old, advantages, where, surrogate="cispo", clip_high=4.0), expected, atol=1e-12
    )


def test_the_token_ratio_is_ppos_clipped_loss():
    logps, old, advantages, where = (jnp.asarray(x) for x in inputs())
    spread = jnp.broadcast_to(advantages[:, None], logps.shape)
    np.testing.assert_array_equal(
        losses.policy_gradient_loss(logps, old, advantages, where=where),
        losses.ppo_clip_loss(logps, old, spread, where=where),
    )


def test_masked_tokens_change_nothing():
    logps, old, advantages, where = inputs()
    filled = np.where(where, logps, np.inf), np.where(where, old, np.nan)
    for settings in SETTINGS.values():
        expected, found = (
            losses.policy_gradient_loss(*map(jnp.asarray, arrays), where=jnp.asarray(where), **settings)
            for arrays in ((logps, old, advantages), (*filled, advantages))
        )
        np.testing.assert_array_equal(found, expected)


def test_advantages_without_the_spread_are_rewards_less_their_mean():
    rewards = jnp.array([[0.0, 1.0, 2.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    np.testing.assert_allclose(
        losses.group_relative_advantages(rewards, scale=False), [[-1, 0, 1, 0], [0, 0, 0, 0]], atol=1e-7
    )
    group = rewards.shape[-1]
    np.testing.assert_allclose(
        losses.leave_one_out_advantages(rewards),
        losses.group_relative_advantages(rewards, scale=False) * group / (group - 1), atol=1e-7,
    )  # fmt: skip


def test_each_token_may_have_an_advantage_of_its_own():
    logps, old, advantages, where = (jnp.asarray(x) for x in inputs())
    spread = jnp.broadcast_to(advantages[:, None], logps.shape)
    np.testing.assert_array_equal(
        losses.policy_gradient_loss(logps, old, spread, where=where),
        losses.policy_gradient_loss(logps, old, advantages, where=where),
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_of_the_kl_and_their_gradients(estimator):
    logps, reference, _, where = inputs()
    d = np.where(where, logps - reference, 0)
    value, slope = {"k1": (d, np.ones_like(d)), "k2": (d**2 / 2, d), "k3": (np.expm1(-d) + d, -np.expm1(-d))}[estimator]
    with jax.enable_x64(True):
        estimate = lambda x: losses.kl_estimate(  # noqa: E731
            x, jnp.asarray(reference), estimator=estimator, where=jnp.asarray(where)
        )
        np.testing.assert_allclose(estimate(jnp.asarray(logps)), value, atol=1e-12)
        gradient = jax.grad(lambda x: jnp.sum(estimate(x)))(jnp.asarray(logps))
        np.testing.assert_allclose(gradient, np.where(where, slope, 0), atol=1e-12)
