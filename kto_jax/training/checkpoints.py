"""Checkpoints: the only file that uses Orbax.

    checkpoints/<step>/state    step, policy, optimizer and objective state, bad-step count, and the reference if it is
                                synced; written in the background
    checkpoints/reference       the frozen reference, which is also the base of low-rank adapters; written once

A checkpoint gets its final name only when it is complete. A killed run resumes from the newest complete one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from kto_jax.config import CheckpointConfig, ConfigError, LoraConfig, TransientError
from kto_jax.devices import processes
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.int8 import INT8
from kto_jax.models.lora import init_adapters, merge_adapters
from kto_jax.models.model import Model, Params
from kto_jax.training.state import TrainState

# Fields of TrainState that a checkpoint holds, unless they are empty.
_MOVING = ("step", "policy", "opt_state", "objective_state", "num_bad_steps")
_BEST = "eval_loss"
# Each replica of an array writes a part of it. Slicing a part compiles a program, so small arrays stay whole.
_MIN_PART_BYTES = 2**20


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder.
      config: how many checkpoints to keep.
      reference_moves: whether the reference is synced, and therefore part of every checkpoint.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, *, reference_moves: bool = False) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO.
        self._directory = workdir.absolute() / "checkpoints"
        self._moving = (*_MOVING, "reference") if reference_moves else _MOVING
        policies = ocp.training.preservation_policies
        self._context = ocp.Context()
        self._context.array.saving.min_slice_bytes_for_replica_parallel = _MIN_PART_BYTES
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=self._context,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(config.keep),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[_BEST],
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def agree_on_latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none; waits until every process has called this.

        Raises:
          TransientError: the processes see different ones, as on a shared file system with delays.
        """
        step = self._checkpointer.latest.step if self._checkpointer.latest else None
        seen = processes.tell(str(step))
        if len(set(seen)) > 1:
            raise TransientError(
                f"the processes see different newest checkpoints in {self._directory}: steps {', '.join(seen)}. All "
                "must see the same. Put --workdir on a file system that they share, and start again later."
            )
        return step

    def save(self, step: int, state: TrainState, eval_loss: float | None) -> None:
        """Starts writing a checkpoint; returns when the state's buffers may be donated.

        Args:
          step: steps taken.
          state: what to save.
          eval_loss: held-out loss at this step, if it was measured; the checkpoint with the lowest is kept. A
            non-finite loss counts as not measured, because NaN is not ordered.

        Raises:
          Exception: the previous save failed.
        """
        if any(found.step == step for found in self._checkpointer.checkpoints):
            return
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": self._moving_part(state)},
            metrics=None if eval_loss is None or not math.isfinite(eval_loss) else {_BEST: eval_loss},
            force=True,
        )
        if jax.default_backend() == "cpu":
            # On CPU the writer reads the state's buffers: a concurrent step would need a second copy of them.
            self.wait()

    def wait(self) -> None:
        """Waits until all started saves are on disk, and raises their errors."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits for saves and releases the background writer's resources."""
        self._checkpointer.close()

    def save_reference(self, reference: Params) -> None:
        """Writes the frozen reference once per run; does nothing if there is none or if it is synced."""
        if reference and "reference" not in self._moving:
            with self._context:
                ocp.save(self._directory / "reference", reference, overwrite=True)

    def _moving_part(self, state: TrainState) -> dict[str, Any]:
        parts = {name: getattr(state, name) for name in self._moving}
        return {name: part for name, part in parts.items() if jax.tree.leaves(part)}

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Reads the checkpoint of a step, with the shardings of `abstract`.

        Raises:
          ConfigError: the checkpoint is of another model or optimizer; lists the differences.
        """
        wanted = self._moving_part(abstract)
        found = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        _check_same(found, wanted, self._directory / str(step))
        moving = self._checkpointer.load_checkpointables(step, {"state": wanted})["state"]
        if abstract.reference and "reference" not in wanted:
            place = self._directory / "reference"
            _check_same(ocp.metadata(place).metadata, abstract.reference, place)
            moving["reference"] = ocp.load(place, abstract.reference)
        return dataclasses.replace(abstract, **moving)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of every array of a tree; elements of tuples and named tuples are named by position."""
    plain = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): (
            tuple(leaf.shape),
            str(leaf.dtype),
        )
        for path, leaf in plain
    }


def _check_same(found: Any, wanted: Any, place: Path) -> None:
    """Refuses a checkpoint whose arrays do not match the model's.

    Raises:
      ConfigError: listing missing, unexpected and differing arrays.
    """
    has, wants = _leaves(found), _leaves(wanted)
    problems = [f"{path}: missing" for path in sorted(wants.keys() - has.keys())]
    problems += [f"{path}: unexpected" for path in sorted(has.keys() - wants.keys())]
    problems += [
        f"{path}: checkpoint has {has[path]}, model wants {wants[path]}"
        for path in sorted(has.keys() & wants.keys())
        if has[path] != wants[path]
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ConfigError(
            f"{place} is a checkpoint of another model or optimizer: {shown}. Resuming needs the same arrays. "
            "Restore the run's configuration, or choose another --workdir."
        )


def read_model(workdir: Path, *, dtype: str = "float32") -> Model:
    """The architecture of a run's policy; reads no weights.

    Raises:
      ConfigError: the folder holds no run.
    """
    try:
        values = json.loads((workdir / "model.json").read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{workdir} is not the folder of a run: it has no model.json. Give a run's --workdir."
        ) from None
    return Model.create(read_config_json(values), dtype=dtype)


def load_policy(workdir: Path, *, dtype: str = "float32") -> tuple[Model, Params, Path]:
    """Loads the policy of a run's newest checkpoint on one device, for sampling.

    Returns:
      The model, its parameters (including a value head if it was trained with one) and its tokenizer's folder.

    Raises:
      ConfigError: the folder holds no run, no complete checkpoint, or a reward model, which has no output head.
    """
    workdir = Path(workdir).absolute()
    model = read_model(workdir, dtype=dtype)
    with ocp.training.Checkpointer(workdir / "checkpoints") as checkpointer:
        if checkpointer.latest is None:
            raise ConfigError(f"{workdir} holds no complete checkpoint yet. Train until the first one is written.")
        step = checkpointer.latest.step
        metadata = checkpointer.checkpointables_metadata(step).metadata["state"]
        if "weight" in metadata["policy"].get(SCALAR_HEAD, {}):
            raise ConfigError(
                f"{workdir} trains a reward model, which scores completions and generates none. A run of a language "
                "model is needed here. Choose one, or score completions with python -m kto_jax.score."
            )
        place = SingleDeviceSharding(jax.devices()[0])

        def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        wanted = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, metadata)
        kept = metadata["policy"]
        has_adapters = "embed" not in kept
        if has_adapters:
            lora = LoraConfig(**json.loads((workdir / "config.json").read_text())["lora"])
            draw = functools.partial(init_adapters, model.abstract_params("float32"), lora)
            kept = kept | jax.eval_shape(draw, jax.random.key(0))
        wanted["policy"] = jax.tree.map(abstract, kept)
        policy = checkpointer.load_checkpointables(step, {"state": wanted})["state"]["policy"]
    if has_adapters:
        reference = workdir / "checkpoints" / "reference"
        kept = ocp.metadata(reference).metadata
        if isinstance(kept["embed"]["table"], dict):
            abstract_int8 = model.abstract_params(INT8)
            kept = {name: abstract_int8[name] for name in kept}
        frozen = ocp.load(reference, jax.tree.map(abstract, kept))
        policy = merge_adapters(frozen, policy, lora.alpha / lora.rank)
    return model, policy, workdir / "tokenizer"
