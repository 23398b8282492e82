"""Supervised fine-tuning: likelihood of the completion, and the mean log-probability that many losses use."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kto_jax.losses.halo import at_least_float32


def mean_logps(logps: Float[Array, "*B"], lengths: Shaped[Array, "*B"]) -> Float[Array, "*B"]:
    """Mean log-probability of each completion's tokens, in nats; 0 for a completion without tokens.

    Args:
      logps: log π_policy(y|x), summed over the completion's tokens.
      lengths: number of tokens in each sum.
    """
    lengths = jnp.asarray(lengths, at_least_float32(logps).dtype)
    return jnp.where(lengths > 0, at_least_float32(logps), 0) / jnp.maximum(lengths, 1)


def sft_loss(logps: Float[Array, "*B"], lengths: Shaped[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood of each completion, a mean over its tokens.

    The mean over all TOKENS of a batch, where long completions count more, is this weighted by `lengths`. CSFT is the
    same loss on completions that follow a control token for good or bad.

    >>> float(sft_loss(jnp.array([-6.0]), jnp.array([4]))[0])
    1.5

    Args:
      logps: log π_policy(y|x), summed over the completion's tokens, in nats.
      lengths: number of tokens in each sum.

    Returns:
      One loss per example, in nats per token, 0 where there are none; the reduction is the caller's.
    """
    return -mean_logps(logps, lengths)
