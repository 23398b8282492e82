"""Settings that a resumed run takes from its config.json if the command line leaves them open."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from kto_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReferenceConfig
from kto_jax.data.tokens.prompts import RENDERING_FIELDS, Rendering, rendering_of
from kto_jax.devices import processes

LEGACY_DEFAULTS = Config(
    model=ModelConfig(reduce_dtype="bfloat16"),
    reference=ReferenceConfig(param_dtype="float32"),
    optimizer=OptimizerConfig(decayed="all"),
)
"""Behaviour of runs that predate a field of config.json, where it differs from the field's default."""
_RECORDED_IF_AUTO = (("reference", "param_dtype"), ("export", "dtype"), ("data", "template_date"))
_NEWER_FIELDS = (("model", "reduce_dtype"), ("optimizer", "decayed"))


def with_recorded_settings(config: Config, workdir: Path) -> Config:
    """The configuration with the settings that the folder's run started with; unchanged if there is no run.

    These are the dtypes of the reference and of the exported policy and the date that chat templates show, if `config`
    has "auto" for them; and what weight decay applies to and how gradients are summed, if the run predates that field.

    Args:
      config: the run.
      workdir: its folder.
    """
    try:
        recorded: dict[str, Any] = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        sections = {section: dict(recorded[section]) for section in ("model", "reference", "optimizer", "data")}
        # Runs that predate this field exported the policy in its training dtype.
        sections["export"] = dict(recorded.get("export", {"dtype": sections["model"].get("param_dtype", "float32")}))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # check_folder reports a broken config.json
        return config
    for section, field in _RECORDED_IF_AUTO:
        if getattr(getattr(config, section), field) == "auto":
            config = _replace_field(config, section, field, sections[section].get(field, "auto"))
    for section, field in _NEWER_FIELDS:
        if field not in sections[section]:
            config = _replace_field(config, section, field, getattr(getattr(LEGACY_DEFAULTS, section), field))
    return config


def _replace_field(config: Config, section: str, field: str, value: Any) -> Config:
    changed = dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **{section: changed})


def with_template_date(config: Config) -> Config:
    """The configuration with the date that chat templates show: today, equal on all processes, if it is "auto"."""
    if config.data.template_date != "auto":
        return config
    (date, *_) = processes.exchange_text(datetime.date.today().isoformat())
    return _replace_field(config, "data", "template_date", date)


def rendering_of_run(folder: Path) -> Rendering:
    """How a run renders conversations, from its folder or its policy/; the defaults if it is not a run."""
    folder = folder.parent if folder.name == "policy" else folder
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
        return rendering_of(DataConfig(**{name: data[name] for name in RENDERING_FIELDS}))
    except (OSError, ValueError, LookupError, TypeError):  # A model, or a run that predates these fields.
        return rendering_of(DataConfig())
