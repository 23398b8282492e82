"""What a single field cannot say: required fields, and fields of the configuration that must fit together.

Rules that need the objective, the data, the model or the devices are in `kto_jax.training`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config.errors import ConfigError
from kto_jax.config.fields import Config

Rule = tuple[str, Any, bool, str]
"""Name of the field, its value, whether it can be used, and what is allowed."""


def check(config: Config) -> None:
    """Refuses values that no run can use.

    Raises:
      ConfigError: naming the field, what is allowed and what to do.
    """
    for name, value, good, allowed in [*_rules(config), *_weights_of_held_out_sources(config)]:
        if not good:
            raise ConfigError(f"config.{name}={value!r} cannot be used. Allowed: {allowed}. Correct config.{name}.")


def _rules(config: Config) -> Iterator[Rule]:
    model, data, objective, targets = config.model, config.data, config.objective, config.lora.targets
    longest = f"data.max_length={data.max_length}"
    yield "model.path", model.path, bool(model.path), "a directory, Hub id, .gguf file or wheel: path"
    yield "data.train", data.train, bool(data.train), "at least one source of feedback"
    fits = data.max_prompt_length < data.max_length
    yield "data.max_prompt_length", data.max_prompt_length, fits, f"at least 1 and below {longest}"
    is_date = data.template_date == "auto" or _is_date(data.template_date)
    yield "data.template_date", data.template_date, is_date, '"auto" or a date, such as 2026-11-28'
    holds_all = config.row_length in (0, "auto") or int(config.row_length) >= data.max_length
    yield "row_length", config.row_length, holds_all, f'0, "auto", or at least {longest}'
    leaves_some = data.holdout + data.judge_holdout < 1
    yield "data.judge_holdout", data.judge_holdout, leaves_some, "at least 0, and with data.holdout below 1"
    yield "lora.targets", targets, 0 < len(targets) == len(set(targets)), "one or more matrices, each once"
    differ = "" not in (controls := (objective.good_control, objective.bad_control)) and len(set(controls)) == 2
    yield "objective.good_control", objective.good_control, differ, "a text, other than objective.bad_control"
    sizes = dataclasses.asdict(config.mesh)
    yield "mesh", sizes, list(sizes.values()).count(-1) <= 1, "-1 on one axis at most"


def _weights_of_held_out_sources(config: Config) -> Iterator[Rule]:
    for i, entry in enumerate(config.data.eval):
        if isinstance(entry, Mapping):
            allowed = "none, since held-out records are read once each"
            yield f"data.eval[{i}].weight", entry.get("weight"), "weight" not in entry, allowed


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
