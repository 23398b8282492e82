"""One token-level policy-gradient loss, of which GRPO, Dr. GRPO, DAPO, RLOO, GSPO and CISPO are settings."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax.losses.halo import at_least_float32, bounded_exponent


def policy_gradient_loss(
    logps: Float[Array, "*B L"],
    old_logps: Float[Array, "*B L"],
    advantages: Float[Array, "*B"],
    *,
    ratio: Literal["token", "sequence"] = "token",
    surrogate: Literal["clip", "cispo"] = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """Loss of each token of completions that an older policy sampled.

    "clip": `−min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A)`. "cispo": `−sg(min(ρ, 1 + clip_high)) A log π`, which
    keeps the gradient of every token. ρ is `π / π_old` of the token, or, with ratio="sequence", its geometric mean over
    the completion, the same for all of its tokens.

    >>> old, new = jnp.zeros((1, 2)), jnp.log(jnp.array([[2.0, 0.5]]))
    >>> [round(float(x), 3) for x in policy_gradient_loss(new, old, jnp.array([1.0]))[0]]
    [-1.2, -0.5]
    >>> [round(float(x), 3) for x in policy_gradient_loss(new, old, jnp.array([1.0]), ratio="sequence")[0]]
    [-1.0, -1.0]

    Args:
      logps: log π of each token under the policy, in nats.
      old_logps: log π of the policy that sampled the tokens.
      advantages: A of each completion.
      ratio: what is clipped.
      surrogate: how it is clipped.
      clip_low: ε_low; "cispo" does not use it.
      clip_high: ε_high.
      where: which tokens count; None counts all.

    Returns:
      One loss per token, 0 where masked; the reduction is the caller's. Log-ratios are clamped to ±20 nats.

    Sources: PPO arXiv 1707.06347; GRPO 2402.03300; DAPO 2503.14476 (clip_high); GSPO 2507.18071, equations (5) and (7);
      CISPO 2506.13585, equations (4) and (5).
    """
    logps, old_logps = at_least_float32(logps), jax.lax.stop_gradient(at_least_float32(old_logps))
    where = jnp.ones(logps.shape, bool) if where is None else where
    advantage = jnp.where(where, jax.lax.stop_gradient(at_least_float32(advantages))[..., None], 0)
    log_ratio = jnp.where(where, logps - old_logps, 0)
    if ratio == "sequence":
        mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)
        log_ratio = jnp.where(where, mean, 0)
    rho = jnp.exp(bounded_exponent(log_ratio))
    if surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(rho, 1 + clip_high))
        return -weight * advantage * jnp.where(where, logps, 0)
    return -jnp.minimum(rho * advantage, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantage)
