"""Settings that a resumed run takes from its config.json, because the command line leaves them open."""

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
"""What runs did before config.json had a field for it, where that is not the field's default."""


def as_begun(config: Config, workdir: Path) -> Config:
    """The configuration with the settings that the run in a folder began with; unchanged if there is no run.

    The dtypes of the reference and of the written policy and the date that chat templates show, if `config` leaves them
    to "auto"; and what weight decay applies to, if the run began before that could be set.

    Args:
      config: the run.
      workdir: its folder.
    """
    try:
        recorded: dict[str, Any] = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        dtype, decayed = recorded["reference"]["param_dtype"], recorded["optimizer"].get("decayed")
        date = recorded["data"].get("template_date", "auto")
        # Before this could be set, the policy was written as it was trained.
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
    """The configuration with a date for chat templates to show: today, equal on all processes, if it says "auto"."""
    if config.data.template_date != "auto":
        return config
    (date, *_) = processes.tell(datetime.date.today().isoformat())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=date))


def rendering_of_run(folder: Path) -> Rendering:
    """How the conversations of a run are rendered, from its folder or its policy/; as by default if it is no run."""
    folder = folder.parent if folder.name == "policy" else folder
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
        return rendering_of(DataConfig(**{name: data[name] for name in RENDERING_FIELDS}))
    except (OSError, ValueError, LookupError, TypeError):  # A model, or a run of before there were these fields.
        return rendering_of(DataConfig())
