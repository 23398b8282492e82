import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import values
from tests.losses import oracle

PPO = functools.partial(values.ppo_clip, clip_low=0.2, clip_high=0.2)
VALUES = {
    "sigmoid": values.sigmoid,
    "log_sigmoid": values.log_sigmoid,
    "identity": values.identity,
    "kahneman_tversky": values.kahneman_tversky,
    "slic": values.slic,
    "ppo_clip, good": functools.partial(PPO, advantage=2.0),
    "ppo_clip, bad": functools.partial(PPO, advantage=-2.0),
}
# A bad token's value falls as it gets likelier: the sign of its advantage is inside the value.
RISING = [name for name in VALUES if name != "ppo_clip, bad"]


def slopes(function, z):
    return jax.jit(jax.grad(lambda z: jnp.sum(function(z))))(z)


def test_the_docstring_examples_hold():
    result = doctest.testmod(values)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", RISING)
def test_values_never_fall(name):
    z = jnp.linspace(-30.0, 30.0, 601)
    assert jnp.all(jnp.diff(VALUES[name](z)) >= 0)
    assert jnp.all(slopes(VALUES[name], z) >= 0)


@pytest.mark.parametrize("name", ["sigmoid", "log_sigmoid", "identity", "kahneman_tversky", "slic"])
def test_values_and_slopes_equal_the_independent_version(name):
    z = np.concatenate([np.random.default_rng(0).normal(0, 3, 1000), [1e4, -1e4, 2e-6, -2e-6, 3e-7, -3e-7]])
    z = z.astype(np.float32)
    expected, expected_slopes = getattr(oracle, f"value_{name}")(z.astype(np.float64))
    np.testing.assert_allclose(VALUES[name](jnp.array(z)), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slopes(VALUES[name], jnp.array(z)), expected_slopes, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("z, expected", [
    (1.0, 1.0), (-1.0, -2.25), (32.0, 2 ** 4.4), (-32.0, -2.25 * 2 ** 4.4), (0.0, 0.0),
])  # fmt: skip
def test_kahneman_tversky_by_hand(z, expected):
    assert values.kahneman_tversky(jnp.array(z)) == pytest.approx(expected, rel=1e-5)


def test_kahneman_tversky_teaches_where_training_starts_with_a_bounded_slope():
    slope = jax.grad(values.kahneman_tversky)
    assert slope(0.0) == pytest.approx(1e-6**-0.12)
    assert slope(-1e-9) == pytest.approx(2.25 * 1e-6**-0.12)
    z = jnp.array([-1e-5, -1.001e-6, -1e-6, -0.999e-6, -1e-30, 1e-30, 0.999e-6, 1e-6, 1.001e-6, 1e-5])
    assert jnp.all(slopes(values.kahneman_tversky, z) < 12)
    assert jnp.all(slopes(values.kahneman_tversky, z) > 3.5)  # at the very kink too, where a maximum would halve it
    assert jnp.all(jnp.diff(values.kahneman_tversky(z)) >= 0)


def test_kahneman_tversky_is_continuous_where_the_line_meets_the_curve():
    inside, outside = values.kahneman_tversky(jnp.array([0.9999e-6, 1.0001e-6]))
    assert outside == pytest.approx(float(inside), rel=1e-3)


def test_kahneman_tversky_of_one_is_linear_with_a_kink():
    result = values.kahneman_tversky(jnp.array([-3.0, 4.0]), alpha=1.0, loss_aversion=2.0)
    np.testing.assert_allclose(result, [-6.0, 4.0])


def test_slic_gains_nothing_beyond_its_margin():
    np.testing.assert_array_equal(values.slic(jnp.array([-2.0, 1.0, 5.0])), [-3, 0, 0])
    np.testing.assert_array_equal(values.slic(jnp.array([-2.0, 1.0, 5.0]), margin=3.0), [-5, -2, 0])


def test_ppo_clip_is_flat_above_the_clip_for_good_tokens_and_below_it_for_bad_ones():
    z = jnp.log(jnp.array([0.5, 1.0, 1.5]))
    np.testing.assert_allclose(PPO(z, advantage=2.0), [1.0, 2.0, 2.4], rtol=1e-6)
    np.testing.assert_allclose(PPO(z, advantage=-2.0), [-1.6, -2.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(PPO(z, advantage=jnp.array([2.0, -2.0, 0.0])), [1.0, -2.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("z", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_values_and_slopes_are_finite_far_out(name, z):
    value, slope = jax.value_and_grad(VALUES[name])(z)
    assert jnp.isfinite(value)
    assert jnp.isfinite(slope)


@pytest.mark.parametrize("name", VALUES)
def test_values_of_bfloat16_are_float32(name):
    assert VALUES[name](jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
