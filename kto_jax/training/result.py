"""The result of a run: the dtype of the exported policy."""

from __future__ import annotations

import dataclasses

from kto_jax.config import Config
from kto_jax.models.weights.stored_dtype import written_dtype
from kto_jax.storage.fetch import local_path


def choose_export_dtype(config: Config) -> Config:
    """The run with `export.dtype="auto"` replaced by the dtype of the base's weights.

    A policy trained in bfloat16 is exported in bfloat16.

    Raises:
      ConfigError: the model cannot be used.
    """
    if config.export.dtype != "auto":
        return config
    trained = config.model.param_dtype
    dtype = trained if trained == "bfloat16" else written_dtype(local_path(config.model.path))
    return dataclasses.replace(config, export=dataclasses.replace(config.export, dtype=dtype))
