"""Adapts the weight of the KL to the reference from round to round, so that the KL comes to a target.

The weight of a round follows from the log of the rounds before it: a run that is resumed has exactly the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.objectives.record import Advantages

_MOST = 0.2
"""Largest relative distance from the target that counts."""


def next_weight(weight: float, kl: float, completions: float, rule: Advantages) -> float:
    """The weight after a round: weight · (1 + clip(kl / target − 1, ±0.2) · completions / horizon).

    arXiv 1909.08593, section 2.2, as its code computes it.

    Args:
      weight: of the round.
      kl: of its completions, the mean in nats.
      completions: their number.
      rule: with the target and the horizon.

    >>> next_weight(0.1, 12.0, 500, Advantages("gae", kl_target=6.0, kl_horizon=1000.0))
    0.11000000000000001
    """
    error = min(max(kl / rule.kl_target - 1, -_MOST), _MOST)
    return weight * (1 + error * completions / rule.kl_horizon)


def rule_of_round(rule: Advantages, log: Sequence[Mapping[str, Any]]) -> Advantages:
    """The rule with the weight of the next round.

    Args:
      rule: as configured; its weight is that of the first round.
      log: of the finished rounds, each with kl_weight, kl_completion and completions if there is a target.

    Raises:
      ConfigError: a round is so large that the weight could become negative.
    """
    if not rule.kl_target or not log:
        return rule
    before = log[-1]
    weight = next_weight(before["kl_weight"], before["kl_completion"], before["completions"], rule)
    if weight <= 0:
        raise ConfigError(
            f"config.objective.kl_horizon={rule.kl_horizon:g} with {before['completions']:g} completions in a round "
            f"gives kl_weight={weight:g}. A round may have fewer than five times as many completions as the horizon. "
            "Raise config.objective.kl_horizon."
        )
    return dataclasses.replace(rule, kl_weight=weight)
