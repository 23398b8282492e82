import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kto_jax import values
from kto_jax.losses import kl_reference_point, kto, kto_loss
from tests.losses import oracle
from tests.losses.properties import BY_HAND


def random_batch(seed, size=1000):
    rng = np.random.default_rng(seed)
    policy = rng.normal(-80, 40, size).astype(np.float32)
    reference = (policy + rng.normal(0, 30, size)).astype(np.float32)
    return policy, reference, rng.random(size) < 0.4


def relative_error(value, expected):
    return np.max(np.abs(np.asarray(value, np.float64) - expected) / np.maximum(1, np.abs(expected)))


def test_the_docstring_example_holds():
    assert doctest.testmod(kto).failed == 0
    assert doctest.testmod(kto).attempted > 0


@pytest.mark.parametrize("log_ratio, desirable, expected", BY_HAND)
def test_losses_by_hand(log_ratio, desirable, expected):
    loss = kto_loss(jnp.array([float(log_ratio)]), jnp.zeros(1), jnp.array([desirable]), jnp.array(2.0), beta=0.1)
    np.testing.assert_allclose(loss, [expected], atol=5e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.7, 0.4)])
def test_values_and_gradients_equal_the_independent_numpy_version(seed, weights):
    policy, reference, desirable = random_batch(seed)
    z0 = 4.25

    def total(policy):
        options = {"beta": 0.1, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        losses = kto_loss(policy, jnp.array(reference), jnp.array(desirable), jnp.array(z0), **options)
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(jnp.array(policy))
    expected, expected_gradient = oracle.kto(policy, reference, desirable, z0, 0.1, *weights)
    assert relative_error(losses, expected) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-5


def test_gradient_agrees_with_finite_differences():
    with jax.enable_x64(True):
        policy, reference, desirable = random_batch(0, 16)
        arguments = jnp.array(reference), jnp.array(desirable), jnp.array(1.5)
        check_grads(lambda p: jnp.sum(kto_loss(jnp.asarray(p), *arguments)), (jnp.array(policy, jnp.float64),), order=1)


def test_the_loss_falls_as_a_desirable_completion_gets_likelier_and_rises_for_an_undesirable_one():
    ratios = jnp.linspace(-40.0, 40.0, 81)
    for desirable, direction in ((True, -1), (False, 1)):
        losses = kto_loss(ratios, jnp.zeros(81), jnp.full(81, desirable), jnp.array(3.0))
        assert jnp.all(direction * jnp.diff(losses) > 0)


@pytest.mark.parametrize("ratio", [1e4, -1e4])
@pytest.mark.parametrize("desirable", [True, False])
def test_extreme_log_ratios_stay_finite(ratio, desirable):
    function = jax.value_and_grad(lambda r: kto_loss(r[None], jnp.zeros(1), jnp.array([desirable]), jnp.array(0.0))[0])
    loss, gradient = function(jnp.array(ratio))
    assert jnp.isfinite(loss)
    assert jnp.isfinite(gradient)


def test_bfloat16_log_probabilities_are_taken_in_float32():
    policy, reference, desirable = random_batch(8, 64)
    rounded = jnp.array(policy, jnp.bfloat16), jnp.array(reference, jnp.bfloat16)
    losses = kto_loss(*rounded, jnp.array(desirable), jnp.array(0.0))
    expected = kto_loss(*(x.astype(jnp.float32) for x in rounded), jnp.array(desirable), jnp.array(0.0))
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, expected)


@pytest.mark.parametrize("desirable, direction", [(True, 1), (False, -1)])
def test_the_kahneman_tversky_value_trains_from_the_reference_where_its_slope_is_infinite(desirable, direction):
    def loss_and_gradient(log_ratio, z0=0.0):
        def loss(r):
            return kto_loss(
                r[None], jnp.zeros(1), jnp.array([desirable]), jnp.array(z0), value_fn=values.kahneman_tversky
            )[0]

        return jax.value_and_grad(loss)(jnp.array(log_ratio))

    loss, gradient = loss_and_gradient(0.0)
    assert loss == 1
    assert gradient == pytest.approx(-direction * 0.1 * 1e-6**-0.12)
    # Nearby the slope is of the same size, and nowhere steeper than that of a loss at the kink.
    for log_ratio, z0 in [(1e-9, 0.0), (-1e-9, 0.0), (1e-5, 0.0), (-1e-5, 0.0), (0.0, 1e-9), (0.0, 1e-5)]:
        _, gradient = loss_and_gradient(log_ratio, z0)
        assert 0.3 < -direction * gradient < 2.26 * 0.1 * 1e-6**-0.12
    log_ratio = 0.0
    for _ in range(10):
        log_ratio -= loss_and_gradient(log_ratio)[1]
    assert direction * log_ratio > 0.5


def test_permuting_and_batching_change_nothing():
    policy, reference, desirable = (jnp.array(x[:24]) for x in random_batch(9))
    z0 = jnp.array(1.0)
    order = np.random.default_rng(0).permutation(24)
    losses = kto_loss(policy, reference, desirable, z0)
    np.testing.assert_array_equal(kto_loss(policy[order], reference[order], desirable[order], z0), losses[order])
    batched = jax.vmap(lambda p, q, d: kto_loss(p, q, d, z0))(
        *(x.reshape(4, 6) for x in (policy, reference, desirable))
    )
    np.testing.assert_array_equal(batched.reshape(-1), losses)


def test_the_reference_point_equals_the_independent_version_and_the_masked_equals_the_sliced():
    policy, reference, where = random_batch(10)
    reference = reference - 3.0
    masked = kl_reference_point(jnp.array(policy), jnp.array(reference), where=jnp.array(where))
    assert masked == pytest.approx(oracle.reference_point(policy, reference, where), rel=1e-5)
    assert masked > 0.5
    sliced = kl_reference_point(jnp.array(policy[where]), jnp.array(reference[where]))
    assert masked == pytest.approx(float(sliced), rel=1e-6)


def test_the_reference_point_is_clamped_after_the_mean_and_only_on_request():
    policy, reference = jnp.array([1.0, -5.0]), jnp.zeros(2)
    assert kl_reference_point(policy, reference) == 0
    assert kl_reference_point(policy, reference, clamp=False) == -2


def test_without_a_pair_the_reference_point_is_zero():
    logps = jnp.array([jnp.inf, 3.0])
    assert kl_reference_point(logps, jnp.zeros(2), where=jnp.zeros(2, bool)) == 0
