"""PPO: clipped policy and value losses over tokens, and generalized advantage estimation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax.losses.halo import at_least_float32, bounded_exponent


def ppo_clip_loss(
    logps: Float[Array, "*B L"],
    old_logps: Float[Array, "*B L"],
    advantages: Float[Array, "*B L"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """Clipped surrogate of each token, `−min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A)` with ρ = π_policy / π_old.

    >>> losses = ppo_clip_loss(jnp.log(jnp.array([[1.5, 0.5]])), jnp.zeros((1, 2)), jnp.array([[1.0, 1.0]]))
    >>> [round(float(loss), 4) for loss in losses[0]]
    [-1.2, -0.5]

    Args:
      logps: log π_policy of each token, in nats.
      old_logps: log π of the policy that sampled the tokens, or of the reference for offline data.
      advantages: A of each token.
      clip_low: ε_low; 0.75 is the lower end of the ratio clip [0.25, 4] of offline PPO in arXiv 2402.01306.
      clip_high: ε_high; 3 is its upper end.
      where: which tokens count; None counts all.

    Returns:
      One loss per token, 0 where masked; the reduction is the caller's. The log-ratio is clamped to ±20 nats.

    Source: Schulman et al., arXiv 1707.06347, equation (7).
    """
    logps, old_logps, advantages = _masked((logps, old_logps, advantages), where)
    ratio = jnp.exp(bounded_exponent(logps - old_logps))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def ppo_value_loss(
    values: Float[Array, "*B L"],
    old_values: Float[Array, "*B L"],
    returns: Float[Array, "*B L"],
    *,
    clip: float = 0.2,
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """Clipped squared error of each token's value, `½ max((V − R)², (V_clipped − R)²)`.

    V_clipped is V clamped to ±clip around the value at sampling time.

    >>> losses = ppo_value_loss(jnp.array([[1.0]]), jnp.array([[0.0]]), jnp.array([[1.0]]))
    >>> round(float(losses[0, 0]), 4)  # ½ (0.2 − 1)²
    0.32

    Args:
      values: V, the value head's estimate at each token.
      old_values: its estimate when the tokens were sampled.
      returns: R, the target: advantages + old_values.
      clip: how far V may move from old_values; beyond that, the loss has no gradient for moving further.
      where: which tokens count; None counts all.

    Returns:
      One loss per token, 0 where masked; the reduction is the caller's.

    Source: the value clipping of PPO's published code, as described in arXiv 2005.12729.
    """
    values, old_values, returns = _masked((values, old_values, returns), where)
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def generalized_advantages(
    rewards: Float[Array, "*B L"],
    values: Float[Array, "*B L"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
    where: Bool[Array, "*B L"] | None = None,
) -> Float[Array, "*B L"]:
    """Generalized advantage estimates, `A_t = δ_t + γλ A_{t+1}` with `δ_t = r_t + γ V_{t+1} − V_t`.

    The completion ends at its last token that counts: beyond it, value and advantage are 0. Tokens that do not count
    (prompt, padding, a tool's text) are skipped.

        rewards      0    0    1    0           where   yes  yes  yes  no
        values       ½    ½    ½    ½
        advantages   ½    ½    ½    0           for trace = 1: what is still to come, less V

    Args:
      rewards: reward of each token; a completion's reward is on its last token.
      values: V of each token.
      discount: γ.
      trace: λ; 1 uses only rewards, 0 bootstraps from the next value.
      where: which tokens count; None counts all.

    Returns:
      One advantage per token, 0 where masked, without gradient. The returns for the value loss are advantages + values.

    Source: Schulman et al., arXiv 1506.02438, equation (16).
    """
    rewards, values = _masked((rewards, values), where)
    where = jnp.ones(rewards.shape, bool) if where is None else where

    def step(carry: tuple[jax.Array, ...], token: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        next_value, next_advantage = carry
        reward, value, counts = token
        advantage = reward + discount * next_value - value + discount * trace * next_advantage
        carry = jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage)
        return carry, jnp.where(counts, advantage, 0)

    zeros = jnp.zeros(rewards.shape[:-1], rewards.dtype)
    beyond: tuple[jax.Array, ...] = (zeros, zeros)
    along_length = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, where))
    _, advantages = jax.lax.scan(step, beyond, along_length, reverse=True)
    return jax.lax.stop_gradient(jnp.moveaxis(advantages, 0, -1))


def _masked(arrays: tuple[jax.Array, ...], where: jax.Array | None) -> tuple[jax.Array, ...]:
    """At least float32, with 0 where masked, so that masked entries affect neither value nor gradient."""
    dtype = jnp.result_type(*(at_least_float32(x) for x in arrays))
    arrays = tuple(jnp.asarray(x, dtype) for x in arrays)
    return arrays if where is None else tuple(jnp.where(where, x, 0) for x in arrays)
