"""The general form of a human-aware loss."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def at_least_float32(x: float | Shaped[Array, "..."]) -> Float[Array, "..."]:
    """`x` in float32, or in float64 if it already is."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def bounded_exponent(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """The log-ratio clamped to ±20 nats, so that its exponential and the exponential's gradient stay finite."""
    return jnp.clip(log_ratio, -20.0, 20.0)


def halo_loss(
    rewards: Float[Array, "*B"],
    reference_point: Float[Array, "*#B"],
    sign: Float[Array, "*B"],
    *,
    value_fn: Callable[[jax.Array], jax.Array],
    weight: float | Float[Array, "*#B"] = 1.0,
) -> Float[Array, "*B"]:
    """Negative weighted value of each completion, `−weight · value_fn(sign · (rewards − reference_point))`.

    Args:
      rewards: implied reward of each completion, in nats; usually β · log(π_policy/π_reference).
      reference_point: gains and losses are measured from it; a scalar or one per example. Gradient flows through it, as
        DPO and SLiC need; KTO stops it.
      sign: +1 for a desirable completion, −1 for an undesirable one.
      value_fn: the value of a gain (positive) or loss (negative); non-decreasing.
      weight: weight of each example.

    Returns:
      One loss per example; the reduction is the caller's.

    Source: Ethayarajh et al., arXiv 2402.01306, definition 3.4.
    """
    rewards, reference_point = at_least_float32(rewards), at_least_float32(reference_point)
    return -weight * value_fn(sign * (rewards - reference_point))
