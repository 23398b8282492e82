"""The reference's dtype, and the effect of rounding the reference on the first batch's rewards.

Before the first step, policy and reference are the same model, so every reward is 0. A reference that is rounded to a
narrower dtype breaks that: after a short SFT, rounding to bfloat16 undoes most of what was learnt.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from kto_jax.config import Config, ConfigError
from kto_jax.models.quantised import QUANTISED
from kto_jax.models.weights.model_files import CONFIG_FILES, find_model
from kto_jax.models.weights.stored_dtype import stored_dtype
from kto_jax.objectives import check_objective


def choose_dtype(config: Config, *, only_config: bool = False) -> Config:
    """The run with `reference.param_dtype="auto"` replaced by a dtype that holds the reference exactly.

    Args:
      config: the run.
      only_config: whether to fetch only config.json of a model on the Hub.

    Raises:
      ConfigError: the objective or the model cannot be used.
    """
    has_reference = config.lora.rank or check_objective(config.objective).uses_reference
    if config.reference.param_dtype != "auto" or not has_reference:
        return config
    # A synced reference becomes a mixture with the policy.
    moves = config.reference.sync_every > 0
    dtype = config.model.param_dtype if moves else _source_dtype(config, only_config=only_config)
    return dataclasses.replace(config, reference=dataclasses.replace(config.reference, param_dtype=dtype))


def _source_dtype(config: Config, *, only_config: bool = False) -> Literal["float32", "bfloat16", "nf4"]:
    """The narrowest dtype that holds the reference's source weights exactly."""
    if not config.reference.path and (config.model.init == "random" or config.model.param_dtype == "bfloat16"):
        return config.model.param_dtype
    source = config.reference if config.reference.path else config.model
    files = find_model(source.path, source.base, hub_files=CONFIG_FILES if only_config else None)
    # The sum with adapters has more digits; those that are trained further stay apart from the base.
    is_sum = files.adapter is not None and config.lora.start == "new"
    return "float32" if is_sum else stored_dtype(files.weights)


def is_rounded(config: Config) -> bool:
    """Whether the reference starts as the policy's initial weights in a narrower dtype.

    Args:
      config: the run, with its dtype resolved.

    Raises:
      ConfigError: the objective or the model cannot be used.
    """
    if config.reference.path or config.lora.rank or not check_objective(config.objective).uses_reference:
        return False
    kept = config.reference.param_dtype
    source = _source_dtype(config)
    return kept != source if kept in QUANTISED else kept == "bfloat16" and source != "bfloat16"


def describe_error(config: Config, errors: dict[str, float]) -> str:
    """The message on the effect of rounding the reference on the first batch, with the remedy.

    Args:
      config: the run.
      errors: from `step.reference_error`.
    """
    kept = config.reference.param_dtype
    return (
        f"the reference is rounded to {kept}: on the {errors['completions']:.0f} completions of the first batch, "
        f"log-probabilities are off by {errors['logps_mean']:.3g} nats on average and {errors['logps_max']:.3g} at "
        f"most, and rewards by {errors['rewards_mean']:.3g} and {errors['rewards_max']:.3g}; without rounding all "
        'rewards would be 0. config.reference.param_dtype="auto" does not round'
    )


def check_error(config: Config, errors: dict[str, float]) -> None:
    """Refuses a reference whose rounding moves rewards by more than `reference.max_error` on average.

    Raises:
      ConfigError: with the error, the limit and the remedies.
    """
    kept, limit = config.reference.param_dtype, config.reference.max_error
    if not errors["rewards_mean"] <= limit:
        raise ConfigError(
            f"config.reference.param_dtype={kept!r} moves the rewards of the first batch, which are 0 without "
            f"rounding, by {errors['rewards_mean']:.3g} on average. Allowed: up to "
            f'config.reference.max_error={limit:g}. Set config.reference.param_dtype to "auto" and choose another '
            "--workdir, or accept the error with a larger config.reference.max_error."
        )
