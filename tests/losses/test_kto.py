import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kto_jax.losses import halo_loss, kl_reference_point, kto, kto_loss
from tests.losses import oracle


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


@pytest.mark.parametrize("log_ratio, desirable, expected", [
    (7, True, 0.3775), (2, True, 0.5), (-3, True, 0.6225), (-3, False, 0.3775),
])  # fmt: skip
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
        check_grads(lambda p: jnp.sum(kto_loss(p, *arguments)), (jnp.array(policy, jnp.float64),), order=1)


def test_at_policy_equal_reference_the_loss_is_half_the_mean_weight():
    logps = jnp.linspace(-50.0, -5.0, 8)
    desirable = jnp.arange(8) < 3
    z0 = kl_reference_point(logps, logps)
    losses = kto_loss(logps, logps, desirable, z0, desirable_weight=1.5, undesirable_weight=0.5)
    assert z0 == 0
    np.testing.assert_allclose(losses, np.where(desirable, 0.75, 0.25), rtol=1e-6)


def test_the_gradient_saturates_as_proposition_4_1_says():
    gradient = jax.grad(lambda r: kto_loss(r[None], jnp.zeros(1), jnp.array([True]), jnp.array(0.0))[0])
    assert gradient(jnp.array(0.0)) == pytest.approx(-0.1 / 4)
    assert gradient(jnp.array(0.0)) / gradient(jnp.array(50.0)) == pytest.approx(37.6, abs=0.05)


def test_no_gradient_flows_through_the_reference_point():
    policy, reference, desirable = (jnp.array(x[:32]) for x in random_batch(5))

    def with_z0_of_the_policy(p):
        return jnp.sum(kto_loss(p, reference, desirable, jnp.mean(p - reference)))

    def with_constant_z0(p):
        return jnp.sum(kto_loss(p, reference, desirable, jnp.mean(policy - reference)))

    np.testing.assert_array_equal(jax.grad(with_z0_of_the_policy)(policy), jax.grad(with_constant_z0)(policy))
    assert not jnp.any(jax.grad(lambda p: kl_reference_point(p, reference))(policy))


def test_scaling_both_weights_scales_loss_and_gradient():
    policy, reference, desirable = (jnp.array(x[:32]) for x in random_batch(6))

    def total(p, scale):
        options = {"desirable_weight": 1.2 * scale, "undesirable_weight": 0.7 * scale}
        return jnp.sum(kto_loss(p, reference, desirable, jnp.array(1.0), **options))

    for function in (total, jax.grad(total)):
        np.testing.assert_allclose(function(policy, 3.0), 3 * function(policy, 1.0), rtol=2e-6)


def test_the_loss_falls_as_a_desirable_completion_gets_likelier_and_rises_for_an_undesirable_one():
    ratios = jnp.linspace(-40.0, 40.0, 81)
    for desirable, direction in ((True, -1), (False, 1)):
        losses = kto_loss(ratios, jnp.zeros(81), jnp.full(81, desirable), jnp.array(3.0))
        assert jnp.all(direction * jnp.diff(losses) > 0)


def test_kto_is_an_instance_of_the_general_form():
    policy, reference, desirable = (jnp.array(x[:32]) for x in random_batch(7))
    sign = jnp.where(desirable, 1.0, -1.0)
    general = halo_loss(0.1 * (policy - reference), jnp.array(0.2), sign, value_fn=jax.nn.sigmoid)
    np.testing.assert_allclose(kto_loss(policy, reference, desirable, jnp.array(2.0)), 1 + general, rtol=1e-6)


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
