"""BCO: a binary classifier of single completions, with rewards centred by their running mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax.losses.halo import at_least_float32


def bco_loss(
    policy_logps: Float[Array, "*B"],
    reference_logps: Float[Array, "*B"],
    desirable: Bool[Array, "*B"],
    running_mean: float | Float[Array, ""],
    *,
    beta: float = 0.1,
) -> Float[Array, "*B"]:
    """BCO loss of each completion, `−log σ(±(βu − δ))`: plus if it is desirable; u is its log-ratio.

    >>> losses = bco_loss(jnp.array([5.0, 5.0]), jnp.zeros(2), jnp.array([True, False]), jnp.array(0.5))
    >>> [round(float(loss), 4) for loss in losses]
    [0.6931, 0.6931]

    Args:
      policy_logps: log π_policy(y|x), summed over the completion's tokens, in nats.
      reference_logps: log π_reference(y|x), likewise.
      desirable: whether each completion got a thumbs-up.
      running_mean: δ, running mean of the rewards βu; see `update_running_mean`. No gradient flows through it.
      beta: scale of the rewards.

    Returns:
      One loss per example; the reduction is the caller's.

    Source: Jung et al., arXiv 2404.04656.
    """
    rewards = beta * (at_least_float32(policy_logps) - at_least_float32(reference_logps))
    centred = rewards - jax.lax.stop_gradient(at_least_float32(running_mean))
    return -jax.nn.log_sigmoid(jnp.where(desirable, centred, -centred))


def update_running_mean(
    running_mean: float | Float[Array, ""],
    count: float | Float[Array, ""],
    rewards: Float[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    max_count: float = float("inf"),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Updates the mean of all rewards seen so far with a batch.

    >>> mean, count = update_running_mean(2.0, 2.0, jnp.array([5.0, 5.0]))
    >>> float(mean), float(count)
    (3.5, 4.0)

    Args:
      running_mean: mean so far; 0 at the start.
      count: number of rewards in the mean; 0 at the start.
      rewards: β times the log-ratios of the WHOLE global batch.
      where: which entries count; None counts all.
      max_count: cap of the count; the mean then becomes an exponential moving average over this many rewards.

    Returns:
      The new mean and count, both without gradient. An empty batch leaves them unchanged.
    """
    rewards = at_least_float32(rewards)
    where = jnp.ones(rewards.shape, bool) if where is None else where
    batch_sum, batch_count = jnp.sum(jnp.where(where, rewards, 0)), jnp.sum(where)
    running_mean, count = at_least_float32(running_mean), at_least_float32(count)
    new_count = jnp.minimum(count + batch_count, jnp.maximum(max_count, batch_count))
    # Computed as an update of the old mean: in a long run, rounding would lose the batch in a sum.
    step = (batch_sum - batch_count * running_mean) / jnp.maximum(new_count, 1)
    return jax.lax.stop_gradient(running_mean + step), jax.lax.stop_gradient(new_count)
