"""Starts a run where another one ended: with its policy, its optimizer's state and the objective's state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kto_jax.devices import processes
from kto_jax.storage.run_place import checkpoints_folder
from kto_jax.training.checkpoint_reading import StoredTree
from kto_jax.training.state import TrainState
from kto_jax.training.stored_policy import find_step

_CARRIED = ("policy", "opt_state", "objective_state")


def carry_state(workdir: Path, abstract: TrainState, state: TrainState) -> TrainState:
    """The state at step 0 with what another run ended with; the reference stays.

    Args:
      workdir: the other run's folder.
      abstract: shapes, dtypes and shardings of the state.
      state: at step 0; its own policy and optimizer are dropped.

    Raises:
      ConfigError: the other run has no checkpoint, or one of another model or optimizer.
    """
    step = processes.call_on_all(lambda: find_step(workdir))
    stored = StoredTree(checkpoints_folder(workdir) / str(step))
    found, _ = stored.read({name: getattr(abstract, name) for name in stored.describe()})
    return dataclasses.replace(state, **{name: found[name] for name in _CARRIED if name in found})
