"""GRPO and RLOO: advantages relative to the other completions of the same prompt, without a value model."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax.losses.halo import at_least_float32, bounded_exponent
from kto_jax.losses.ppo import ppo_clip_loss


def grpo_loss(
    logps: Float[Array, "*B L"],
    old_logps: Float[Array, "*B L"],
    reference_logps: Float[Array, "*B L"],
    advantages: Float[Array, "*B L"] | Float[Array, "*B"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.04,
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """GRPO loss of each token: PPO's clipped surrogate + kl_weight · KL, with the k3 estimator of the KL.

    Args:
      logps: log π_policy of each token, in nats.
      old_logps: log π of the policy that sampled the tokens.
      reference_logps: log π_reference of each token.
      advantages: A of each token, or one per completion; see `group_relative_advantages`, `leave_one_out_advantages`.
      clip_low: ε_low.
      clip_high: ε_high.
      kl_weight: weight of the KL to the reference; called β in the paper.
      where: which tokens count; None counts all.

    Returns:
      One loss per token, 0 where masked; the reduction is the caller's.

    Source: Shao et al., arXiv 2402.03300, equations (3) and (4).
    """
    if advantages.ndim < logps.ndim:
        advantages = jnp.broadcast_to(advantages[..., None], logps.shape)
    surrogate = ppo_clip_loss(logps, old_logps, advantages, clip_low=clip_low, clip_high=clip_high, where=where)
    return surrogate + kl_weight * k3_kl(logps, reference_logps, where=where)


def k3_kl(
    logps: Float[Array, "*B L"], reference_logps: Float[Array, "*B L"], *, where: Bool[Array, "*B L"] | None = None
) -> Float[Array, "*B L"]:
    """Estimate of KL(policy ‖ reference) at each token, `e^d − d − 1` with d = log π_reference − log π_policy.

    Never negative, and unbiased for tokens that the policy sampled. It is constant from d = 20 nats on: if only the
    exponential's d were bounded, the remaining −d would push the policy further away.

    >>> round(float(k3_kl(jnp.array([[0.0]]), jnp.array([[-1.0]]))[0, 0]), 4)  # e^−1 + 1 − 1
    0.3679

    Args:
      logps: log π_policy of each token, in nats.
      reference_logps: log π_reference of each token.
      where: which tokens count; None counts all.

    Returns:
      One estimate per token, in nats, 0 where masked.

    Source: Schulman, "Approximating KL divergence", 2020, estimator k3.
    """
    difference = at_least_float32(reference_logps) - at_least_float32(logps)
    difference = difference if where is None else jnp.where(where, difference, 0)
    return jnp.expm1(bounded_exponent(difference)) - jnp.minimum(difference, 20)


def kl_estimate(
    logps: Float[Array, "*B L"],
    reference_logps: Float[Array, "*B L"],
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """Estimate of KL(policy ‖ reference) at each token, of `d = log π_policy − log π_reference`.

    "k1": d. "k2": d²/2. "k3": `e^−d + d − 1`, see `k3_kl`. As terms of a loss they differ more than as figures: on
    tokens that the policy sampled, the gradient of k1 is 0 on average, that of k2 is the gradient of the KL, and that
    of k3 is the gradient of the KL in the other direction.

    >>> d = jnp.array([[0.5, -0.5]])
    >>> [round(float(x), 4) for x in kl_estimate(d, jnp.zeros((1, 2)), estimator="k2")[0]]
    [0.125, 0.125]

    Args:
      logps: log π_policy of each token, in nats.
      reference_logps: log π_reference of each token.
      estimator: which.
      where: which tokens count; None counts all.

    Returns:
      One estimate per token, in nats, 0 where masked.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    if estimator == "k3":
        return k3_kl(logps, reference_logps, where=where)
    difference = at_least_float32(logps) - at_least_float32(reference_logps)
    difference = difference if where is None else jnp.where(where, difference, 0)
    return difference if estimator == "k1" else jnp.square(difference) / 2


def group_relative_advantages(
    rewards: Float[Array, "*B G"], *, scale: bool = True, epsilon: float = 1e-4
) -> Float[Array, "*B G"]:
    """GRPO's advantages, `(r − mean) / (std + epsilon)` over the G completions of each prompt.

    >>> [round(float(a), 3) for a in group_relative_advantages(jnp.array([0.0, 1.0, 2.0, 1.0]))]
    [-1.414, 0.0, 1.414, 0.0]

    Args:
      rewards: one per completion; the last axis holds a prompt's completions.
      scale: whether to divide by the standard deviation, as GRPO does and Dr. GRPO (arXiv 2503.20783) does not.
      epsilon: keeps a group of equal rewards at 0.

    Returns:
      Advantages without gradient; std is the population standard deviation of the group.

    Source: Shao et al., arXiv 2402.03300, section 4.1.2.
    """
    rewards = at_least_float32(rewards)
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    if not scale:
        return jax.lax.stop_gradient(centred)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True))
    return jax.lax.stop_gradient(centred / (deviation + epsilon))


def leave_one_out_advantages(rewards: Float[Array, "*B G"]) -> Float[Array, "*B G"]:
    """RLOO's advantages: each reward minus the mean of the prompt's OTHER completions.

    >>> [float(a) for a in leave_one_out_advantages(jnp.array([0.0, 1.0, 2.0]))]
    [-1.5, 0.0, 1.5]

    Args:
      rewards: one per completion; the last axis holds a prompt's completions.

    Returns:
      Advantages without gradient.

    Raises:
      ValueError: groups of one completion, which have no others.

    Source: Ahmadian et al., arXiv 2402.14740.
    """
    group = rewards.shape[-1]
    if group < 2:
        raise ValueError(f"Groups of {group} completion have no others to compare with. Sample at least 2 per prompt.")
    rewards = at_least_float32(rewards)
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    return jax.lax.stop_gradient(centred * (group / (group - 1)))
