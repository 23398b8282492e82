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
    advantages: Float[Array, "*B L"] | Float[Array, "*B"],
    *,
    ratio: Literal["token", "sequence"] = "token",
    surrogate: Literal["clip", "cispo"] = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """Loss of each token of completions that an older policy sampled.

    "clip": `−min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A)`. "cispo": `−sg(min(ρ, 1 + clip_high)) A log π`, which
    keeps the gradient of every token. ρ is `π / π_old` of the token, or, with ratio="sequence", its geometric mean over
    the completion, the same for all of its tokens. With `dual_clip`, c, the loss of a token with A < 0 is at most −cA,
    however large ρ is.

    >>> old, new = jnp.zeros((1, 2)), jnp.log(jnp.array([[2.0, 0.5]]))
    >>> [round(float(x), 3) for x in policy_gradient_loss(new, old, jnp.array([1.0]))[0]]
    [-1.2, -0.5]
    >>> [round(float(x), 3) for x in policy_gradient_loss(new, old, jnp.array([1.0]), ratio="sequence")[0]]
    [-1.0, -1.0]

    Args:
      logps: log π of each token under the policy, in nats.
      old_logps: log π of the policy that sampled the tokens.
      advantages: A of each token, or of each completion.
      ratio: what is clipped.
      surrogate: how it is clipped.
      clip_low: ε_low; "cispo" does not use it.
      clip_high: ε_high.
      dual_clip: c, above 1; 0 for none. "cispo" does not use it.
      where: which tokens count; None counts all.

    Returns:
      One loss per token, 0 where masked; the reduction is the caller's. Log-ratios are clamped to ±20 nats.

    Sources: PPO arXiv 1707.06347; GRPO 2402.03300; DAPO 2503.14476 (clip_high); GSPO 2507.18071, equations (5) and (7);
      CISPO 2506.13585, equations (4) and (5); dual clip 1912.09729, equation (5).
    """
    where = jnp.ones(logps.shape, bool) if where is None else where
    advantage = _by_token(advantages, where)
    rho = _ratio(logps, old_logps, ratio, where)
    if surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(rho, 1 + clip_high))
        return -weight * advantage * jnp.where(where, at_least_float32(logps), 0)
    loss = -jnp.minimum(rho * advantage, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantage)
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss) if dual_clip else loss


def clipped_tokens(
    logps: Float[Array, "*B L"],
    old_logps: Float[Array, "*B L"],
    advantages: Float[Array, "*B L"] | Float[Array, "*B"],
    *,
    ratio: Literal["token", "sequence"] = "token",
    surrogate: Literal["clip", "cispo"] = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    where: Bool[Array, "*B L"] | None = None,
) -> Bool[Array, "*B L"]:
    """Tokens on which the clip acts: those whose loss in `policy_gradient_loss` has no gradient, or a capped weight.

    >>> old, new = jnp.zeros((1, 3)), jnp.log(jnp.array([[1.3, 0.7, 1.1]]))
    >>> clipped_tokens(new, old, jnp.array([1.0]))[0].tolist(), clipped_tokens(new, old, jnp.array([-1.0]))[0].tolist()
    ([True, False, False], [False, True, False])

    Args and sources: as `policy_gradient_loss`.
    """
    where = jnp.ones(logps.shape, bool) if where is None else where
    advantage = _by_token(advantages, where)
    rho = _ratio(logps, old_logps, ratio, where)
    if surrogate == "cispo":
        return where & (rho > 1 + clip_high) & (advantage != 0)
    above, below = (advantage > 0) & (rho > 1 + clip_high), (advantage < 0) & (rho < 1 - clip_low)
    return where & (above | below | ((advantage < 0) & (rho > dual_clip) if dual_clip else False))


def _by_token(advantages: Array, where: Bool[Array, "*B L"]) -> Float[Array, "*B L"]:
    """The advantage of each token, without gradient; 0 where masked."""
    advantages = jax.lax.stop_gradient(at_least_float32(advantages))
    return jnp.where(where, advantages if advantages.ndim == where.ndim else advantages[..., None], 0)


def _ratio(logps: Array, old_logps: Array, ratio: str, where: Bool[Array, "*B L"]) -> Float[Array, "*B L"]:
    """π / π_old of each token, or its geometric mean over each completion; 1 where masked."""
    log_ratio = at_least_float32(logps) - jax.lax.stop_gradient(at_least_float32(old_logps))
    log_ratio = jnp.where(where, log_ratio, 0)
    if ratio == "sequence":
        mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)
        log_ratio = jnp.where(where, mean, 0)
    return jnp.exp(bounded_exponent(log_ratio))
