"""Objectives: what each algorithm reads, its reference point and its loss, over packed slots.

An objective is a small record of pure functions. The step computes the log-probabilities that it asks for and knows
nothing else about it. Adding one: a function here and a line in `OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float

from kto_jax.config import ConfigError, ObjectiveConfig, nearest
from kto_jax.losses import kl_reference_point, kto_loss

# Keep λ_D n_D / (λ_U n_U) between these, arXiv 2402.01306, equation (8).
_WEIGHT_RATIO = (1.0, 4 / 3)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      beta: scale of the implied rewards, β (log π_policy − log π_reference), in the metrics.
      desirable_weight: λ_D, resolved.
      undesirable_weight: λ_U, resolved.
      reference_point: (policy log-probs, reference log-probs, where) of the unmatched pairs of the whole global batch
        -> z0, a scalar in nats.
      loss: (policy log-probs, reference log-probs, desirable, z0) -> one loss per slot.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference_point: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def make_objective(config: ObjectiveConfig, *, num_desirable: int, num_undesirable: int) -> Objective:
    """The objective that the configuration names; the counts of the training set resolve weights of "auto"."""
    check_objective(config)
    return OBJECTIVES[config.name](config, *auto_weights(config, num_desirable, num_undesirable))


def check_objective(config: ObjectiveConfig) -> None:
    """Raises ConfigError when there is no objective of that name."""
    if config.name not in OBJECTIVES:
        raise ConfigError(f"config.objective.name={config.name!r} is not known. {nearest(config.name, OBJECTIVES)}")


def auto_weights(config: ObjectiveConfig, num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """λ_D and λ_U, where "auto" on either raises the one that must rise, and no further than it must.

    With 100 desirable and 300 undesirable examples the ratio λ_D n_D / (λ_U n_U) is brought up to 1 by λ_D = 3; with
    400 and 200 it is brought down to 4/3 by λ_U = 1.5.

    Raises:
      ConfigError: "auto" beside a number other than 1, or one of the classes is empty.
    """
    desirable, undesirable = config.desirable_weight, config.undesirable_weight
    if desirable != "auto" and undesirable != "auto":
        return float(desirable), float(undesirable)
    if not {desirable, undesirable} <= {"auto", 1.0}:
        raise ConfigError(
            f"config.objective.desirable_weight={desirable!r} stands beside undesirable_weight={undesirable!r}. "
            '"auto" chooses both, one of them 1. Set the other to "auto" or 1, or both to numbers.'
        )
    if not num_desirable or not num_undesirable:
        raise ConfigError(
            f'"auto" weights need both classes; the training set has {num_desirable} desirable and {num_undesirable} '
            "undesirable examples. Give config.objective.desirable_weight and undesirable_weight as numbers."
        )
    low, high = _WEIGHT_RATIO
    ratio = num_desirable / num_undesirable
    return max(low / ratio, 1.0), max(ratio / high, 1.0)


def kto(config: ObjectiveConfig, desirable_weight: float, undesirable_weight: float) -> Objective:
    """KTO with the batch's KL as the reference point, equation (7)."""

    def reference_point(
        policy_logps: Float[Array, "M R S"], reference_logps: Float[Array, "M R S"], where: Bool[Array, "M R S"]
    ) -> Float[Array, ""]:
        if config.kl_nonzero_mean:
            where = where & (policy_logps != reference_logps)
        return kl_reference_point(policy_logps, reference_logps, where=where)

    def loss(
        policy_logps: Float[Array, "R S"],
        reference_logps: Float[Array, "R S"],
        desirable: Bool[Array, "R S"],
        z0: Float[Array, ""],
    ) -> Float[Array, "R S"]:
        return kto_loss(
            policy_logps,
            reference_logps,
            desirable,
            z0,
            beta=config.beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )

    return Objective(config.beta, desirable_weight, undesirable_weight, reference_point, loss)


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, float, float], Objective]] = {"kto": kto}
