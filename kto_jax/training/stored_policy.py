"""The policy of a checkpoint of a run, on one device: to sample from it, or to export it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.int8 import INT8
from kto_jax.models.lora import init_adapters, merge_adapters
from kto_jax.models.model import Model, Params
from kto_jax.storage.run_place import checkpoints_folder
from kto_jax.training.checkpoint_reading import StoredTree, best_step, quiet_libraries


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
    quiet_libraries()
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
        if measured := {one.step: one.metrics[metric] for one in found if metric in (one.metrics or {})}:
            return best_step(measured, metric)
    elif step.isdecimal() and int(step) in steps:
        return int(step)
    raise ConfigError(
        f"--step={step} is no checkpoint of {workdir}. Allowed: {', '.join(map(str, steps))}, last, and best if "
        "held-out feedback was evaluated. Set --step."
    )


def load_checkpoint(workdir: Path, step: int, *, dtype: str = "float32") -> StoredPolicy:
    """Reads the policy of a checkpoint.

    Args:
      workdir: the run's folder.
      step: from `find_step`.
      dtype: what the model computes in.

    Raises:
      ConfigError: the checkpoint is damaged; names the arrays.
    """
    workdir = Path(workdir).absolute()
    model = read_model(workdir, dtype=dtype)
    place = SingleDeviceSharding(jax.devices()[0])

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    quiet_libraries()
    stored = StoredTree(checkpoints_folder(workdir) / str(step))
    record, metadata = stored.record(), stored.describe()
    kept = metadata["policy"]
    wanted = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, metadata)
    has_adapters = "embed" not in kept
    if has_adapters:
        lora = LoraConfig(**json.loads((workdir / "config.json").read_text())["lora"])
        draw = functools.partial(init_adapters, model.abstract_params("float32"), lora)
        adapters = jax.eval_shape(draw, jax.random.key(0))
        kept = kept | adapters
    wanted["policy"] = jax.tree.map(abstract, kept)
    trained = stored.load(wanted)["policy"]
    stored.compare(record, {"policy": trained})
    head = trained.get(SCALAR_HEAD)
    if head is not None:
        model = Model.create(model.config, dtype=dtype, scalar_head="reward" if "weight" in head else "value")
    if not has_adapters:
        return StoredPolicy(model, trained, trained)
    frozen = _load_base(workdir, lora, adapters, abstract)
    return StoredPolicy(model, merge_adapters(frozen, trained, lora.alpha / lora.rank), trained)


def _load_base(workdir: Path, lora: LoraConfig, adapters: Params, abstract: Callable[[Any], Any]) -> Params:
    """The frozen weights that a run's adapters belong to; `abstract` gives each array its place."""
    stored = StoredTree(checkpoints_folder(workdir) / "reference", is_step=False)
    kept = stored.describe()
    table = kept["embed"]["table"]
    whole = read_model(workdir).abstract_params(INT8 if isinstance(table, dict) else table.dtype)
    frozen = {name: whole[name] for name in kept}
    if lora.start == "continue":
        frozen = merge_adapters(frozen, adapters, lora.alpha / lora.rank)
    return stored.read(jax.tree.map(abstract, frozen))[0]


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
