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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from kto_jax.config import CheckpointConfig, ConfigError, LoraConfig, TransientError
from kto_jax.devices import processes
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.finite import find_nonfinite
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.int8 import INT8
from kto_jax.models.lora import init_adapters, merge_adapters
from kto_jax.models.model import Model, Params
from kto_jax.storage.run_place import checkpoints_folder
from kto_jax.training.state import TrainState

# Fields of TrainState that a checkpoint holds, unless they are empty.
_STATE_FIELDS = ("step", "policy", "opt_state", "objective_state", "num_bad_steps")
# Each replica of an array writes a part of it. Slicing a part compiles a program, so small arrays stay whole.
_MIN_PART_BYTES = 2**20


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder.
      config: how many checkpoints to keep.
      metric: the held-out figure that decides which checkpoint is best.
      reference_is_synced: whether the reference is synced, and therefore part of every checkpoint.
    """

    def __init__(
        self, workdir: Path, config: CheckpointConfig, *, metric: str = "eval_loss", reference_is_synced: bool = False
    ) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO.
        self._directory = checkpoints_folder(workdir)
        self._metric = metric
        self._fields = (*_STATE_FIELDS, "reference") if reference_is_synced else _STATE_FIELDS
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
                        get_metric_fn=self._sort_key,
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
        seen = processes.exchange_text(str(step))
        if len(set(seen)) > 1:
            raise TransientError(
                f"the processes see different newest checkpoints in {self._directory}: steps {', '.join(seen)}. All "
                "must see the same. Put --workdir on a file system that they share, and start again later."
            )
        return step

    def _sort_key(self, metrics: Mapping[str, float]) -> Any:
        """The sort key: lower is better, and of equal figures the first. Infinite if another metric was saved."""
        found = metrics.get(self._metric, math.inf)
        cost = found if self._metric == "eval_loss" or found == math.inf else -found
        return cost, metrics.get("step", 0)

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best figure, as the first process sees it; None if none has one."""
        found = {
            one.step: one.metrics[self._metric] for one in self._checkpointer.checkpoints if _has(one, self._metric)
        }
        answer = processes.exchange_text(str(best_step(found, self._metric) if found else ""))[0]
        return int(answer) if answer else None

    def save(self, step: int, state: TrainState, figures: Mapping[str, float] | None) -> None:
        """Starts writing a checkpoint; returns when the state's buffers may be donated.

        Args:
          step: steps taken.
          state: what to save.
          figures: held-out figures at this step, if they were measured; the checkpoint with the best one is kept. A
            non-finite figure counts as not measured, because NaN is not ordered.

        Raises:
          Exception: the previous save failed.
        """
        if any(found.step == step for found in self._checkpointer.checkpoints):
            return
        held_out = {
            name: value for name, value in (figures or {}).items() if name.startswith("eval_") and math.isfinite(value)
        }
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": self._saved_fields(state)},
            metrics=held_out | {"step": step} if self._metric in held_out else None,
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
        if reference and "reference" not in self._fields:
            with self._context:
                ocp.save(self._directory / "reference", reference, overwrite=True)

    def _saved_fields(self, state: TrainState) -> dict[str, Any]:
        parts = {name: getattr(state, name) for name in self._fields}
        return {name: part for name, part in parts.items() if jax.tree.leaves(part)}

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Reads the checkpoint of a step, with the shardings of `abstract`.

        Raises:
          ConfigError: the checkpoint is of another model or optimizer; lists the differences. Or it is damaged.
        """
        wanted = self._saved_fields(abstract)
        found = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        _check_arrays(found, wanted, self._directory / str(step))
        moving = self._checkpointer.load_checkpointables(step, {"state": wanted})["state"]
        if abstract.reference and "reference" not in wanted:
            place = self._directory / "reference"
            _check_arrays(ocp.metadata(place).metadata, abstract.reference, place)
            moving["reference"] = ocp.load(place, abstract.reference)
        processes.call_on_all(lambda: self._check_finite(step, moving))
        return dataclasses.replace(abstract, **moving)

    def _check_finite(self, step: int, parts: Mapping[str, Any]) -> None:
        # Steps with values that are not finite are not applied, so a run never saves any.
        if broken := find_nonfinite(parts):
            raise ConfigError(
                f"the checkpoint of step {step} in {self._directory} is damaged: values are NaN or infinite in "
                f"{', '.join(broken[:3])}{f' and {len(broken) - 3} more' if len(broken) > 3 else ''}. All must be "
                f"finite. Remove the folder {step} to resume from the checkpoint before it; if the reference is "
                "damaged, start again in another --workdir."
            )


def _has(checkpoint: Any, metric: str) -> bool:
    return bool(checkpoint.metrics) and metric in checkpoint.metrics


def _shapes_and_dtypes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of every array of a tree; elements of tuples and named tuples are named by position."""
    plain = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): (
            tuple(leaf.shape),
            str(leaf.dtype),
        )
        for path, leaf in plain
    }


def _check_arrays(found: Any, wanted: Any, place: epath.Path) -> None:
    """Refuses a checkpoint whose arrays do not match the model's.

    Raises:
      ConfigError: listing missing, unexpected and differing arrays.
    """
    has, wants = _shapes_and_dtypes(found), _shapes_and_dtypes(wanted)
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


@dataclasses.dataclass(frozen=True)
class StoredPolicy:
    """The policy of a checkpoint, on one device.

    Attributes:
      model: the architecture, with the scalar head that is trained: none, "reward" or "value".
      policy: the parameters; adapters are merged into those that are frozen.
      trained: what the run trains: the parameters, or the adapters alone.
    """

    model: Model
    policy: Params
    trained: Params


def find_step(workdir: Path, step: str = "last") -> int:
    """The step of a checkpoint that a run has.

    Args:
      workdir: the run's folder.
      step: "last", "best" (the best held-out figure, as config.evaluation.metric says) or a number.

    Raises:
      ConfigError: the run has no whole checkpoint, or not this one; lists those that there are.
    """
    read_model(workdir)
    with ocp.training.Checkpointer(checkpoints_folder(workdir)) as checkpointer:
        found = list(checkpointer.checkpoints)
    if not found:
        raise ConfigError(f"{workdir} holds no complete checkpoint yet. Train until the first one is written.")
    steps = sorted(one.step for one in found)
    if step == "last":
        return steps[-1]
    if step == "best":
        settings = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        metric = settings["evaluation"].get("metric", "eval_loss")
        if measured := {one.step: one.metrics[metric] for one in found if _has(one, metric)}:
            return best_step(measured, metric)
    elif step.isdecimal() and int(step) in steps:
        return int(step)
    raise ConfigError(
        f"--step={step} is no checkpoint of {workdir}. Allowed: {', '.join(map(str, steps))}, last, and best if "
        "held-out feedback was evaluated. Set --step."
    )


def best_step(figures: Mapping[int, float], metric: str) -> int:
    """The step with the best figure, the first of equal ones: the lowest loss, or the highest of another metric."""
    sign = 1 if metric == "eval_loss" else -1
    return min(figures, key=lambda step: (sign * figures[step], step))


def load_checkpoint(workdir: Path, step: int, *, dtype: str = "float32") -> StoredPolicy:
    """Reads the policy of a checkpoint.

    Args:
      workdir: the run's folder.
      step: from `find_step`.
      dtype: what the model computes in.
    """
    workdir = Path(workdir).absolute()
    model = read_model(workdir, dtype=dtype)
    place = SingleDeviceSharding(jax.devices()[0])

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    with ocp.training.Checkpointer(checkpoints_folder(workdir)) as checkpointer:
        metadata = checkpointer.checkpointables_metadata(step).metadata["state"]
        kept = metadata["policy"]
        wanted = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, metadata)
        has_adapters = "embed" not in kept
        if has_adapters:
            lora = LoraConfig(**json.loads((workdir / "config.json").read_text())["lora"])
            draw = functools.partial(init_adapters, model.abstract_params("float32"), lora)
            adapters = jax.eval_shape(draw, jax.random.key(0))
            kept = kept | adapters
        wanted["policy"] = jax.tree.map(abstract, kept)
        trained = checkpointer.load_checkpointables(step, {"state": wanted})["state"]["policy"]
    head = trained.get(SCALAR_HEAD)
    if head is not None:
        model = Model.create(model.config, dtype=dtype, scalar_head="reward" if "weight" in head else "value")
    if not has_adapters:
        return StoredPolicy(model, trained, trained)
    scale, reference = lora.alpha / lora.rank, checkpoints_folder(workdir) / "reference"
    kept = ocp.metadata(reference).metadata
    table = kept["embed"]["table"]
    whole = read_model(workdir).abstract_params(INT8 if isinstance(table, dict) else table.dtype)
    frozen = {name: whole[name] for name in kept}
    if lora.start == "continue":
        frozen = merge_adapters(frozen, adapters, scale)
    frozen = ocp.load(reference, jax.tree.map(abstract, frozen))
    return StoredPolicy(model, merge_adapters(frozen, trained, scale), trained)


def load_policy(workdir: Path, *, dtype: str = "float32") -> tuple[Model, Params, Path]:
    """Loads the policy of a run's newest checkpoint on one device, for sampling.

    Returns:
      The model, its parameters (including a value head if it was trained with one) and its tokenizer's folder.

    Raises:
      ConfigError: the folder holds no run, no complete checkpoint, or a reward model, which has no output head.
    """
    workdir = Path(workdir).absolute()
    stored = load_checkpoint(workdir, find_step(workdir), dtype=dtype)
    if stored.model.scalar_head == "reward":
        raise ConfigError(
            f"{workdir} trains a reward model, which scores completions and generates none. A run of a language "
            "model is needed here. Choose one, or score completions with python -m kto_jax.score."
        )
    return read_model(workdir, dtype=dtype), stored.policy, workdir / "tokenizer"
