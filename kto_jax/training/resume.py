"""Settings that a resumed run takes from its config.json if the command line leaves them open."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from kto_jax.config import Config, DataConfig, OptimizerConfig, ReferenceConfig
from kto_jax.data.tokens.prompts import RENDERING_FIELDS, Rendering, rendering_of
from kto_jax.devices import processes

BEFORE_FIELDS = Config(reference=ReferenceConfig(param_dtype="float32"), optimizer=OptimizerConfig(decayed="all"))
"""Behaviour of runs that predate a field of config.json, where it differs from the field's default."""


def as_begun(config: Config, workdir: Path) -> Config:
    """The configuration with the settings that the folder's run started with; unchanged if there is no run.

    These are the dtypes of the reference and of the exported policy and the date that chat templates show, if `config`
    has "auto" for them; and what weight decay applies to, if the run predates that field.

    Args:
      config: the run.
      workdir: its folder.
    """
    try:
        recorded: dict[str, Any] = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        dtype, decayed = recorded["reference"]["param_dtype"], recorded["optimizer"].get("decayed")
        date = recorded["data"].get("template_date", "auto")
        # Runs that predate this field exported the policy in its training dtype.
        written = recorded.get("export", {"dtype": recorded["model"].get("param_dtype", "float32")})["dtype"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # check_folder reports a broken config.json
        return config
    if config.reference.param_dtype == "auto":
        config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, param_dtype=dtype))
    if config.data.template_date == "auto":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=date))
    if config.export.dtype == "auto":
        config = dataclasses.replace(config, export=dataclasses.replace(config.export, dtype=written))
    if decayed is None:
        before = BEFORE_FIELDS.optimizer.decayed
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decayed=before))
    return config


def with_template_date(config: Config) -> Config:
    """The configuration with the date that chat templates show: today, equal on all processes, if it is "auto"."""
    if config.data.template_date != "auto":
        return config
    (date, *_) = processes.tell(datetime.date.today().isoformat())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=date))


def rendering_of_run(folder: Path) -> Rendering:
    """How a run renders conversations, from its folder or its policy/; the defaults if it is not a run."""
    folder = folder.parent if folder.name == "policy" else folder
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
        return rendering_of(DataConfig(**{name: data[name] for name in RENDERING_FIELDS}))
    except (OSError, ValueError, LookupError, TypeError):  # A model, or a run that predates these fields.
        return rendering_of(DataConfig())
