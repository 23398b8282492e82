"""KTO: Kahneman-Tversky optimization. Start here: the whole idea is two functions.

A completion's reward is its log-ratio r = log π_policy(y|x) − log π_reference(y|x). People feel gains and losses
against a reference point z0, here the KL divergence of the policy from the reference, and with saturation, here a
sigmoid. A desirable completion should be a gain, an undesirable one a loss:

    desirable:    λ_D (1 − σ(β (r − z0)))
    undesirable:  λ_U (1 − σ(β (z0 − r)))

Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", ICML 2024, arXiv 2402.01306.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax.losses.halo import at_least_float32, halo_loss


def kto_loss(
    policy_logps: Float[Array, " B"],
    reference_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    reference_point: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    value_fn: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
) -> Float[Array, " B"]:
    """KTO loss of each completion, equation (7): `λ_y − λ_y v(β · ±(r − z0))`.

    >>> losses = kto_loss(jnp.array([7.0, -3.0]), jnp.zeros(2), jnp.array([True, False]), jnp.array(2.0))
    >>> [round(float(loss), 4) for loss in losses]
    [0.3775, 0.3775]

    Args:
      policy_logps: log π_policy(y|x), summed over the completion's tokens, in nats.
      reference_logps: log π_reference(y|x), likewise.
      desirable: whether each completion got a thumbs-up.
      reference_point: z0 of the global batch, in nats; see `kl_reference_point`. No gradient flows through it.
      beta: how fast the value saturates.
      desirable_weight: λ_D.
      undesirable_weight: λ_U.
      value_fn: the value function v; the sigmoid in the paper.

    Returns:
      One loss per example, in [0, λ_y] for the sigmoid; the reduction is the caller's.
    """
    rewards = beta * (at_least_float32(policy_logps) - at_least_float32(reference_logps))
    sign = jnp.where(desirable, 1, -1).astype(rewards.dtype)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight).astype(rewards.dtype)
    reference_point = beta * jax.lax.stop_gradient(at_least_float32(reference_point))
    return weight + halo_loss(rewards, reference_point, sign, value_fn=value_fn, weight=weight)


def kl_reference_point(
    policy_logps: Float[Array, "*B"],
    reference_logps: Float[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    clamp: bool = True,
) -> Float[Array, ""]:
    """The reference point z0: mean log-ratio of mismatched pairs, an estimate of KL(policy ‖ reference), from below 0.

    The log-probabilities must be those of the WHOLE global batch: the clamp does not commute with a mean over parts.

    Args:
      policy_logps: log π_policy(y_j|x_i) of prompts with another prompt's completion, summed over tokens, in nats.
      reference_logps: log π_reference(y_j|x_i), likewise.
      where: which entries count; None counts all. With none left, z0 is 0.
      clamp: whether a negative mean becomes 0, as in the paper.

    Returns:
      A scalar in nats, without gradient.
    """
    log_ratios = at_least_float32(policy_logps) - at_least_float32(reference_logps)
    where = jnp.ones(log_ratios.shape, bool) if where is None else where
    mean = jnp.sum(jnp.where(where, log_ratios, 0)) / jnp.maximum(jnp.sum(where), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0) if clamp else mean)
