"""Which losses are instances of the general form: value and gradient are those of `halo_loss`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import losses, values


def draw(*shape, center=-40.0, spread=12.0):
    return [jnp.array(x, jnp.float32) for x in np.random.default_rng(3).normal(center, spread, shape)]


def of_kto():
    policy, reference = draw(2, 64)
    desirable = jnp.arange(64) % 3 == 0
    sign, weight = jnp.where(desirable, 1.0, -1.0), jnp.where(desirable, 1.3, 0.8)

    def direct(policy):
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
        return losses.kto_loss(policy, reference, desirable, jnp.array(2.0), **weights)

    def general(policy):
        # C of the definition is λ_y.
        rewards = 0.1 * (policy - reference)
        return weight + losses.halo_loss(rewards, jnp.array(0.2), sign, value_fn=values.sigmoid, weight=weight)

    return direct, general, [policy]


def of_dpo():
    chosen, rejected, *references = draw(4, 64)

    def general(chosen, rejected):
        rewards = 0.1 * (chosen - references[0]), 0.1 * (rejected - references[1])
        return losses.halo_loss(*rewards, jnp.ones(64), value_fn=values.log_sigmoid)

    return lambda chosen, rejected: losses.dpo_loss(chosen, rejected, *references), general, [chosen, rejected]


def of_slic():
    def direct(chosen, rejected):
        return losses.slic_loss(chosen, rejected, jnp.full(64, -1.0), margin=2.0, nll_weight=0.0)

    def general(chosen, rejected):
        value_fn = functools.partial(values.slic, margin=2.0)
        return losses.halo_loss(chosen, rejected, jnp.ones(64), value_fn=value_fn)

    return direct, general, draw(2, 64)


def of_ppo_clip():
    logps, old, advantages = draw(3, 64, center=0.0, spread=0.5)

    def direct(logps):
        return losses.ppo_clip_loss(logps, old, advantages, clip_low=0.2, clip_high=0.3)

    def general(logps):
        value_fn = functools.partial(values.ppo_clip, advantage=advantages, clip_low=0.2, clip_high=0.3)
        return losses.halo_loss(logps - old, jnp.array(0.0), jnp.ones(64), value_fn=value_fn)

    return direct, general, [logps]


@pytest.mark.parametrize("instance", [of_kto, of_dpo, of_slic, of_ppo_clip])
def test_kto_dpo_ppo_clip_and_the_calibration_of_slic_are_instances_of_the_general_form(instance):
    direct, general, policy = instance()
    np.testing.assert_allclose(direct(*policy), general(*policy), rtol=1e-5, atol=1e-6)
    by_each = range(len(policy))
    got, expected = (jax.grad(lambda *p, loss=loss: jnp.sum(loss(*p)), by_each)(*policy) for loss in (direct, general))
    for gradient, right in zip(got, expected, strict=True):
        assert jnp.any(right)
        np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-7)
