"""KTO: Kahneman-Tversky optimization. Start here: the whole idea is two functions.

A completion's reward is its log-ratio r = log π_policy(y|x) − log π_reference(y|x). People perceive gains and losses
relative to a reference point z0, here the KL divergence of the policy from the reference, and with diminishing
sensitivity, here a sigmoid. A desirable completion should be a gain, an undesirable one a loss:

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
    policy_logps: Float[Array, "*B"],
    reference_logps: Float[Array, "*B"],
    desirable: Bool[Array, "*B"],
    reference_point: Float[Array, "*#B"],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    value_fn: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
) -> Float[Array, "*B"]:
    """KTO loss of each completion, equation (7): `λ_y − λ_y v(β · ±(r − z0))`.

    >>> losses = kto_loss(jnp.array([7.0, -3.0]), jnp.zeros(2), jnp.array([True, False]), jnp.array(2.0))
    >>> [round(float(loss), 4) for loss in losses]
    [0.3775, 0.3775]

    Args:
      policy_logps: log π_policy(y|x), summed over the completion's tokens, in nats.
      reference_logps: log π_reference(y|x), likewise.
      desirable: whether each completion got a thumbs-up.
      reference_point: z0 of the global batch, in nats; see `kl_reference_point`; or one per example, see
        `opposite_class_reference_point`. No gradient flows through it.
      beta: how fast the value saturates.
      desirable_weight: λ_D.
      undesirable_weight: λ_U.
      value_fn: the value function v; the sigmoid in the paper, others in kto_jax.values.

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
    """The reference point z0: mean log-ratio of mismatched pairs, an estimate of KL(policy ‖ reference), clamped at 0.

    The log-probabilities must cover the WHOLE global batch: the clamp does not commute with a mean over parts.

    Args:
      policy_logps: log π_policy(y_j|x_i) of prompts with another prompt's completion, summed over tokens, in nats.
      reference_logps: log π_reference(y_j|x_i), likewise.
      where: which entries count; None counts all. If none counts, z0 is 0.
      clamp: whether a negative mean becomes 0, as in the paper.

    Returns:
      A scalar in nats, without gradient.
    """
    log_ratios = at_least_float32(policy_logps) - at_least_float32(reference_logps)
    where = jnp.ones(log_ratios.shape, bool) if where is None else where
    mean = jnp.sum(jnp.where(where, log_ratios, 0)) / jnp.maximum(jnp.sum(where), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0) if clamp else mean)


def opposite_class_reference_point(
    policy_logps: Float[Array, "*B"],
    reference_logps: Float[Array, "*B"],
    desirable: Bool[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    clamp: bool = True,
) -> Float[Array, "*B"]:
    """SimpleKTO's reference point: mean log-ratio of the opposite class, which needs no unmatched pairs.

    >>> opposite_class_reference_point(jnp.array([4.0, 1.0, 3.0]), jnp.zeros(3), jnp.array([True, False, False]))
    Array([2., 4., 4.], dtype=float32)

    Args:
      policy_logps: log π_policy(y|x) of the WHOLE global batch, summed over tokens, in nats.
      reference_logps: log π_reference(y|x), likewise.
      desirable: whether each completion got a thumbs-up.
      where: which entries count; None counts all. An empty class has the mean 0.
      clamp: whether a negative mean becomes 0.

    Returns:
      One reference point per example, in nats, without gradient: from the undesirable examples for desirable ones, and
      vice versa.
    """
    where = jnp.ones(desirable.shape, bool) if where is None else where
    of_desirable, of_undesirable = (
        kl_reference_point(policy_logps, reference_logps, where=where & members, clamp=clamp)
        for members in (desirable, ~desirable)
    )
    return jnp.where(desirable, of_undesirable, of_desirable)


def apo_zero_unpaired_loss(
    policy_logps: Float[Array, "*B"],
    reference_logps: Float[Array, "*B"],
    desirable: Bool[Array, "*B"],
    *,
    beta: float = 0.1,
) -> Float[Array, "*B"]:
    """APO-zero on single completions, `1 − σ(βu)` desirable, `σ(βu)` undesirable: KTO with z0 = 0 and weights of 1.

    Args:
      policy_logps: log π_policy(y|x), summed over the completion's tokens, in nats.
      reference_logps: log π_reference(y|x), likewise.
      desirable: whether each completion got a thumbs-up.
      beta: how fast the value saturates.

    Returns:
      One loss per example; the reduction is the caller's.

    Source: D'Oosterlinck et al., arXiv 2408.06266.
    """
    return kto_loss(policy_logps, reference_logps, desirable, jnp.zeros(()), beta=beta)


def log_utility_loss(
    policy_chosen_logps: Float[Array, "*B"],
    policy_rejected_logps: Float[Array, "*B"],
    reference_chosen_logps: Float[Array, "*B"],
    reference_rejected_logps: Float[Array, "*B"],
    reference_point: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    as_printed: bool = False,
) -> Float[Array, "*B"]:
    """KTO's utility of a PAIR inside a log-sigmoid, `−log σ(λ_D σ(β (r_w − z0)) + λ_U σ(β (z0 − r_l)))`.

    A secondary source prints this loss with a minus between the two terms. With the minus the loss FALLS as r_l rises:
    it rewards the rejected completion. `as_printed=True` selects that form, only for comparison.

    >>> zeros, z0 = jnp.zeros(1), jnp.array(0.0)
    >>> [round(float(log_utility_loss(zeros, zeros, zeros, zeros, z0, as_printed=p)[0]), 4) for p in (False, True)]
    [0.3133, 0.6931]

    Args:
      policy_chosen_logps: log π_policy of the chosen completion, summed over its tokens, in nats.
      policy_rejected_logps: likewise, of the rejected completion.
      reference_chosen_logps: log π_reference of the chosen completion, likewise.
      reference_rejected_logps: log π_reference of the rejected completion, likewise.
      reference_point: z0 of the global batch, in nats; see `kl_reference_point`. No gradient flows through it.
      beta: how fast the value saturates.
      desirable_weight: λ_D.
      undesirable_weight: λ_U.
      as_printed: whether to use the minus.

    Returns:
      One loss per pair; the reduction is the caller's.
    """
    chosen = at_least_float32(policy_chosen_logps) - at_least_float32(reference_chosen_logps)
    rejected = at_least_float32(policy_rejected_logps) - at_least_float32(reference_rejected_logps)
    reference_point = jax.lax.stop_gradient(at_least_float32(reference_point))
    gain = desirable_weight * jax.nn.sigmoid(beta * (chosen - reference_point))
    relief = undesirable_weight * jax.nn.sigmoid(beta * (reference_point - rejected))
    return -jax.nn.log_sigmoid(gain - relief if as_printed else gain + relief)


def humanline_clamp(
    token_log_ratios: Float[Array, "*T"], *, low: float = -1.0, high: float = 1.5
) -> Float[Array, "*T"]:
    """Each TOKEN's log-ratio clamped to [low, high] before the sum over a completion; a clamped token has no gradient.

    >>> humanline_clamp(jnp.array([-3.0, 0.5, 3.0]))
    Array([-1. ,  0.5,  1.5], dtype=float32)

    Args:
      token_log_ratios: log π_policy − log π_reference of each token, in nats.
      low: lower bound, in nats.
      high: upper bound, in nats.

    Source: Ethayarajh et al., "Humanline: Online Alignment as Perceptual Loss", arXiv 2509.24207.
    """
    return jnp.clip(at_least_float32(token_log_ratios), low, high)
