"""The result of a run: which step's policy is exported, and in which dtype."""

from __future__ import annotations

import dataclasses

import jax

from kto_jax.config import Config
from kto_jax.models.weights.model_files import find_model
from kto_jax.models.weights.stored_dtype import common_dtype
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.patience import Patience
from kto_jax.training.state import TrainState


def choose_export_dtype(config: Config) -> Config:
    """The run with `export.dtype="auto"` replaced by the dtype of the base's weights.

    A policy trained in bfloat16 is exported in bfloat16.

    Raises:
      ConfigError: the model cannot be used.
    """
    if config.export.dtype != "auto":
        return config
    trained = config.model.param_dtype
    base = find_model(config.model.path, config.model.base).weights
    dtype = trained if trained == "bfloat16" else common_dtype(base)
    return dataclasses.replace(config, export=dataclasses.replace(config.export, dtype=dtype))


def choose_result(
    config: Config,
    num_steps: int,
    checkpoints: Checkpoints,
    abstract: TrainState,
    state: TrainState,
    patience: Patience,
) -> tuple[TrainState, list[str]]:
    """The state whose policy is the result, and sentences on which step it is of and why the run ended there.

    Args:
      config: the run.
      num_steps: steps of the whole run.
      checkpoints: the run's.
      abstract: shapes and shardings of the state.
      state: the last one; it is deleted if another one is the result.
      patience: the evaluations.
    """
    last = int(state.step)
    notes = [patience.describe()] if last < num_steps else []
    best = checkpoints.best_step() if config.export.step == "best" else None
    if best is not None and best != last:
        jax.tree.map(lambda leaf: leaf.delete(), state)
        state = checkpoints.restore(abstract, best)
    if config.export.step == "best":
        which = f"the best {config.evaluation.metric}" if best is not None else "the last: no evaluation was finite"
        notes.append(f"policy/ is of step {last if best is None else best} of {last}, {which}")
    return state, notes
