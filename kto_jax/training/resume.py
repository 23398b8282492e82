"""Settings that a resumed run takes from its config.json, because the command line leaves them open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from kto_jax.config import Config, OptimizerConfig

BEFORE_FIELDS = Config(optimizer=OptimizerConfig(decayed="all"))
"""What runs did before config.json had a field for it, where that is not the field's default."""


def as_begun(config: Config, workdir: Path) -> Config:
    """The configuration with the settings that the run in a folder began with; unchanged if there is no run.

    The dtype of the reference, if `config` leaves it to "auto"; and what weight decay applies to, if the run began
    before that could be set.

    Args:
      config: the run.
      workdir: its folder.
    """
    try:
        recorded: dict[str, Any] = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        dtype, decayed = recorded["reference"]["param_dtype"], recorded["optimizer"].get("decayed")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # check_folder reports a broken config.json
        return config
    if config.reference.param_dtype == "auto":
        config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, param_dtype=dtype))
    if decayed is None:
        before = BEFORE_FIELDS.optimizer.decayed
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decayed=before))
    return config
