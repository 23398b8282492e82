"""Metrics of a batch of feedback, as pure functions that run inside the step."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax.objectives import Objective
from kto_jax.shapes import Completions, FeedbackBatch

# A tenth of the sigmoid's maximum slope, 1/4: reached at |z| = 3.64.
_SATURATED_SLOPE = 0.025


def mean(values: Float[Array, "*B"], where: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Mean of the entries that count; 0 if there are none."""
    return jnp.sum(jnp.where(where, values, 0)) / jnp.maximum(jnp.sum(where), 1)


def standard_error(values: Float[Array, "*B"], where: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Standard error of the mean, with the sample variance; 0 for fewer than two entries."""
    count = jnp.sum(where)
    squares = jnp.sum(jnp.where(where, jnp.square(values - mean(values, where)), 0))
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1) / jnp.maximum(count, 1))


def auc(rewards: Float[Array, "*B"], desirable: Bool[Array, "*B"], where: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Probability that a random desirable completion has a larger reward than an undesirable one; ties count half.

    NaN if a class is absent: there is nothing to compare.
    """
    negatives = jnp.sort(jnp.where(where & ~desirable, rewards, jnp.inf))
    num_negatives = jnp.sum(where & ~desirable)
    below = jnp.minimum(jnp.searchsorted(negatives, rewards, side="left"), num_negatives)
    not_above = jnp.minimum(jnp.searchsorted(negatives, rewards, side="right"), num_negatives)
    wins = jnp.sum(jnp.where(where & desirable, (below + not_above) / 2, 0))
    # In floating point: 50,000 of each class make more pairs than int32 can count.
    pairs = jnp.sum(where & desirable).astype(rewards.dtype) * num_negatives
    return jnp.where(pairs > 0, wins / jnp.maximum(pairs, 1), jnp.nan)


def class_metrics(
    rewards: Float[Array, "*B"], desirable: Bool[Array, "*B"], where: Bool[Array, "*B"]
) -> dict[str, Float[Array, ""]]:
    """How well rewards separate the two classes.

    Returns:
      rewards_desirable and rewards_undesirable: means by class, NaN if it is absent. margin: their difference. auc: see
      `auc`.
    """
    means = {}
    for name, members in (("desirable", where & desirable), ("undesirable", where & ~desirable)):
        means[name] = jnp.where(jnp.any(members), mean(rewards, members), jnp.nan)
    return {
        "rewards_desirable": means["desirable"],
        "rewards_undesirable": means["undesirable"],
        "margin": means["desirable"] - means["undesirable"],
        "auc": auc(rewards, desirable, where),
    }


def reward_metrics(
    objective: Objective, completions: Completions, batch: FeedbackBatch, reference_reward: Array
) -> dict[str, Float[Array, ""]]:
    """The reward metrics of an objective.

    Args:
      objective: decides which metrics there are.
      completions: the batch's matched completions, [M, R, S].
      batch: their labels.
      reference_reward: the reward from which gains and losses of thumbs are measured; a scalar or [M, R, S].
    """
    rewards, filled = objective.rewards(completions), batch.matched.filled
    flat = (rewards.reshape(-1), batch.desirable.reshape(-1), filled.reshape(-1))
    if objective.reads == "desirable":
        return {"rewards_desirable": mean(rewards, filled)}
    figures = class_metrics(*flat)
    if objective.reads == "pairs":
        return figures | {"accuracy": pair_accuracy(rewards, filled)}
    if objective.reads == "thumbs" and objective.uses_reference:
        gains = (rewards - reference_reward).reshape(-1)
        figures |= {"accuracy": accuracy(gains, *flat[1:])}
        if objective.saturates:
            figures |= {"saturated": saturated(gains, flat[2])}
    return figures


def accuracy(gains: Float[Array, "*B"], desirable: Bool[Array, "*B"], where: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Share of completions on the right side of the reference point: desirable above it, undesirable below it."""
    return mean(jnp.where(desirable, gains > 0, gains < 0).astype(gains.dtype), where)


def saturated(gains: Float[Array, "*B"], where: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Share of completions whose gradient is below a tenth of the maximum, for sigmoid value functions."""
    value = 1 / (1 + jnp.exp(-jnp.clip(gains, -80, 80)))
    return mean((value * (1 - value) < _SATURATED_SLOPE).astype(gains.dtype), where)


def pair_accuracy(rewards: Float[Array, "*M R S"], where: Bool[Array, "*M R S"]) -> Float[Array, ""]:
    """Share of pairs, in slots 2k and 2k + 1, whose chosen completion has the larger reward."""
    wins = rewards[..., 0::2] > rewards[..., 1::2]
    return mean(wins.astype(rewards.dtype), where[..., 0::2])
