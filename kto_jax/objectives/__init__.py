"""Objectives: builds the record of pure functions that the step minimises from the configuration."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax import losses
from kto_jax.config import ConfigError, ObjectiveConfig, nearest
from kto_jax.objectives.algorithms import OBJECTIVES
from kto_jax.objectives.record import Objective, Point, State
from kto_jax.shapes import Completions

__all__ = ["OBJECTIVES", "Objective", "auto_weights", "check_objective", "defaults", "make_objective"]

# Bounds of λ_D n_D / (λ_U n_U), arXiv 2402.01306, equation (8).
_WEIGHT_RATIO = (1.0, 4 / 3)


def make_objective(config: ObjectiveConfig, *, num_desirable: int, num_undesirable: int) -> Objective:
    """Builds the objective that the configuration names.

    Args:
      config: its options.
      num_desirable: desirable completions in the training set; the counts resolve "auto" weights. Pairs have equal
        counts.
      num_undesirable: likewise.

    Raises:
      ConfigError: there is no objective of that name, an option is set that it does not use, options conflict, or
        "auto" weights cannot be resolved.
    """
    _check_options(config)
    accepted = defaults(config.name)
    options = {name: getattr(config, name) for name in accepted if getattr(config, name) != "auto"}
    if "desirable_weight" in accepted:
        in_pairs = OBJECTIVES[config.name]().reads == "pairs"
        weights = auto_weights(config, *((1, 1) if in_pairs else (num_desirable, num_undesirable)))
        options |= dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    try:
        objective = OBJECTIVES[config.name](**options)
    except ValueError as error:
        raise ConfigError(f"config.objective cannot be used: {error}") from None
    return _with_common_options(objective, config, accepted | options)


def _with_common_options(objective: Objective, config: ObjectiveConfig, options: dict[str, Any]) -> Objective:
    """Applies the options of every objective: the SFT term, and humanline if there is a reference."""
    if config.humanline and not objective.uses_reference:
        raise ConfigError(
            f"config.objective.humanline=True has no effect on {config.name!r}, which uses no log-ratios. It is for "
            "objectives with a reference. Remove it, or set config.objective.name."
        )
    if config.sft_weight and objective.scalar_head == "reward":
        raise ConfigError(
            f"config.objective.sft_weight={config.sft_weight} has no effect on a reward model, which generates no "
            "text. It is for every other objective. Remove it."
        )
    if config.humanline:
        objective = dataclasses.replace(objective, humanline=(config.humanline_low, config.humanline_high))
        options |= {"humanline": objective.humanline}
    if config.sft_weight:
        objective = dataclasses.replace(objective, loss=_with_sft(objective.loss, config.sft_weight))
        options |= {"sft_weight": config.sft_weight}
    return dataclasses.replace(objective, options=options)


def _with_sft(loss: Callable[..., Array], weight: float) -> Callable[..., Array]:
    def with_sft(completions: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        likelihood = losses.sft_loss(completions.likelihood, completions.lengths)
        return loss(completions, point, state) + weight * jnp.where(completions.desirable, likelihood, 0)

    return with_sft


def defaults(name: str) -> dict[str, Any]:
    """The options of an objective, with the value that "auto" stands for."""
    return {parameter.name: parameter.default for parameter in inspect.signature(OBJECTIVES[name]).parameters.values()}


def check_objective(config: ObjectiveConfig) -> Objective:
    """Refuses options that the objective cannot use, before any data is read; "auto" weights need the counts later.

    Returns:
      The objective for equally many desirable and undesirable completions.

    Raises:
      ConfigError: as `make_objective`.
    """
    return make_objective(config, num_desirable=1, num_undesirable=1)


def _check_options(config: ObjectiveConfig) -> None:
    if config.name not in OBJECTIVES:
        raise ConfigError(f"config.objective.name={config.name!r} is not known. {nearest(config.name, OBJECTIVES)}")
    accepted = {"name", "sft_weight", *defaults(config.name)}
    if config.humanline:
        accepted |= {"humanline", "humanline_low", "humanline_high"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in accepted:
            raise ConfigError(
                f"config.objective.{field.name}={value!r} has no effect on the objective {config.name!r}. It uses "
                f"{', '.join(sorted(accepted - {'name'}))}. Remove it, or set config.objective.name."
            )


def auto_weights(config: ObjectiveConfig, num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """λ_D and λ_U; "auto" on either raises one of them, by no more than the bounds on their ratio require.

    With 100 desirable and 300 undesirable examples, λ_D = 3 raises the ratio λ_D n_D / (λ_U n_U) to 1. With 400 and
    200, λ_U = 1.5 lowers it to 4/3.

    Raises:
      ConfigError: "auto" is combined with a number other than 1, or a class is empty.
    """
    desirable, undesirable = config.desirable_weight, config.undesirable_weight
    if desirable != "auto" and undesirable != "auto":
        return float(desirable), float(undesirable)
    if not {desirable, undesirable} <= {"auto", 1.0}:
        raise ConfigError(
            f"config.objective.desirable_weight={desirable!r} cannot be combined with "
            f"undesirable_weight={undesirable!r}. "
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
