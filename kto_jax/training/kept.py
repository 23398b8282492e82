"""Starts a run where another one ended, with what that one left in memory, or else with what it left in its folder.

The rounds of online training are runs of one process: from one to the next, the policy, the optimizer's state, the
objective's state and the reference stay on the devices, and the compiled step is used again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kto_jax.config import Config, resolve
from kto_jax.devices import processes
from kto_jax.devices.compilation import Program
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.models.quantised import QUANTISED
from kto_jax.models.weights.load import load_params
from kto_jax.models.weights.model_files import find_model
from kto_jax.objectives import Objective, check_objective
from kto_jax.storage.run_place import checkpoints_folder
from kto_jax.training.checkpoint_reading import StoredTree
from kto_jax.training.initial_state import initial_reference, make_abstract_state, make_model
from kto_jax.training.inputs import Inputs
from kto_jax.training.state import TrainState, create_state, without_shared
from kto_jax.training.step import Recipe, jit_train_step, make_recipe
from kto_jax.training.stored_policy import find_step, read_architecture


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
      run: its folder.
      config: the run, with every setting resolved.
      model: its policy.
      state: the last one. A field is {} or None if the folder no longer holds it.
    """

    run: Path
    config: Config
    model: Model
    state: TrainState


class Kept:
    """What a run leaves in memory for the next one of its process."""

    def __init__(self) -> None:
        self._ended: Ended | None = None
        self._compiled: tuple[Any, Recipe, Program] | None = None

    def step(self, config: Config, recipe: Recipe, num_steps: int) -> tuple[Recipe, Program]:
        """The recipe and its compiled step; those of the run before if they are the same."""
        key = _key_of_step(config, recipe, num_steps)
        if self._compiled is None or self._compiled[0] != key:
            self._compiled = key, recipe, Program(jit_train_step(recipe))
        return self._compiled[1:]

    def leave(self, run: Path, config: Config, model: Model, state: TrainState) -> None:
        """Keeps how a run has ended."""
        self._ended = Ended(run.absolute(), config, model, state)

    def ended(self, run: Path) -> Ended:
        """How a run ended, read from its folder if this process did not run it last; every process must call this.

        Raises:
          ConfigError: the folder holds no whole checkpoint.
        """
        if self._ended is None or self._ended.run != run.absolute():
            self._ended = None  # before another one needs the memory
            self._ended = _read_ended(run.absolute())
        return self._ended

    def drop(self) -> None:
        """Forgets how the last run ended, whose buffers are donated or not needed."""
        self._ended = None


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts, and what it leaves.

    Attributes:
      kept: what runs of this process leave to each other.
      after: the run whose last policy this one starts with; None for config.model.path.
      keeps_optimizer: whether it starts with that run's optimizer's and objective's state too.
      exports: whether policy/ and the report are written at its end.
      saves: whether checkpoints are written before a signal asks for one; without any, a killed run begins anew.
    """

    kept: Kept = dataclasses.field(default_factory=Kept)
    after: Path | None = None
    keeps_optimizer: bool = False
    exports: bool = True
    saves: bool = True


def continue_state(
    config: Config, inputs: Inputs, model: Model, recipe: Recipe, abstract: TrainState, start: Start
) -> TrainState:
    """The state at step 0 of a run that starts where another one ended.

    The reference is that of config.reference.path, or the base of adapters; without either, the policy as it starts.

    Raises:
      ConfigError: the other run left no checkpoint, or one of another model or optimizer.
    """
    assert start.after is not None, "a run that continues another one"
    ended = start.kept.ended(start.after)
    start.kept.drop()
    before = ended.state
    if start.keeps_optimizer and before.opt_state is None:
        find_step(ended.run)  # says that there is no checkpoint
    if before.reference and _source_of_reference(config, goes_on=True) == _source_of_reference(ended.config):
        reference = before.reference
    else:
        reference = initial_reference(config, inputs, model, abstract.reference, before.policy)
    mesh = abstract.step.sharding.mesh
    if not start.keeps_optimizer:
        return create_state(before.policy, reference, recipe.optimizer, mesh, inputs.objective.initial_state)
    zero = lambda: jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)  # noqa: E731
    reference = without_shared(reference, before.policy)
    return dataclasses.replace(before, step=zero(), num_bad_steps=zero(), reference=reference)


def _source_of_reference(config: Config, *, goes_on: bool = False) -> tuple[str, ...]:
    """What the reference's values depend on; () if they are of no other run.

    Args:
      config: the run.
      goes_on: whether the run starts with the policy of another one, and not with config.model.path.
    """
    own, kept = config.reference, config.reference.param_dtype
    is_policy = not own.path and not config.lora.rank
    if own.sync_every or (is_policy and (goes_on or kept in QUANTISED)):
        return ()
    source = own if own.path else config.model
    return source.path, source.base, kept, "float32" if own.path else config.model.param_dtype


def _key_of_step(config: Config, recipe: Recipe, num_steps: int) -> Any:
    """All that a compiled step depends on, beside the shapes of its arguments."""
    optimizer, model = config.optimizer, dataclasses.replace(config.model, path="", base="")
    rounds = "bfloat16" in (model.param_dtype, optimizer.moments_dtype) or config.lora.dropout
    parts = (
        config.objective,
        sorted(recipe.objective.options.items()),
        optimizer,
        model,
        dataclasses.replace(config.reference, path="", base=""),
        config.seed if rounds else None,
        None if optimizer.schedule == "constant" else num_steps,
    )
    return recipe.model, repr(parts)


# ------------------------------------------------------------------------------------------------ from a run's folder


@dataclasses.dataclass(frozen=True)
class _ModelInputs:
    """What decides the shapes of a run's state."""

    architecture: TransformerConfig
    objective: Objective


def _read_ended(run: Path) -> Ended:
    config = resolve(json.loads((run / "config.json").read_text(encoding="utf-8")))
    objective = check_objective(config.objective)
    inputs = _ModelInputs(read_architecture(run), objective)
    mesh, model = make_model(config, inputs)
    optimizer = make_recipe(config, objective, model, num_steps=1).optimizer
    abstract = make_abstract_state(config, inputs, model, mesh, optimizer)
    is_exported = (run / "policy").is_dir() and not config.lora.rank and objective.scalar_head == "none"
    if processes.broadcast_bool(is_exported and not (run / "checkpoints").is_dir()):
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract.policy)
        files = find_model(str(run / "policy"))
        load = lambda: load_params(model, files, param_dtype=config.model.param_dtype, shardings=layout)  # noqa: E731
        state = dataclasses.replace(abstract, policy=processes.call_on_all(load), reference={}, opt_state=None)
        return Ended(run, config, model, state)
    folder, step = checkpoints_folder(run), processes.call_on_all(lambda: find_step(run))
    stored = StoredTree(folder / str(step))
    found = dict(stored.read({name: getattr(abstract, name) for name in stored.describe()})[0])
    if config.lora.rank:
        found["reference"] = StoredTree(folder / "reference", is_step=False).read(abstract.reference)[0]
    return Ended(run, config, model, dataclasses.replace(abstract, **{"reference": {}} | found))
