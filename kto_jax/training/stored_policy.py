"""The policy of a checkpoint of a run, on one device: to sample from it, or to export it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.lora import init_adapters, merge_adapters
from kto_jax.models.model import Model, Params
from kto_jax.models.quantised import QUANTISED
from kto_jax.models.weights.adapter_names import resolve_lora
from kto_jax.progress import console
from kto_jax.storage.run_place import checkpoints_folder
from kto_jax.training.checkpoint_reading import StoredTree, best_step, quiet_libraries


def read_model(workdir: Path, *, dtype: str = "float32") -> Model:
    """The model of a run's policy; reads no weights.

    Raises:
      ConfigError: the folder holds no run.
    """
    return Model.create(read_architecture(workdir), dtype=dtype)


def read_architecture(workdir: Path) -> TransformerConfig:
    """The architecture of a run's policy.

    Raises:
      ConfigError: the folder holds no run.
    """
    try:
        return read_config_json(json.loads((workdir / "model.json").read_text()))
    except FileNotFoundError:
        raise ConfigError(
            f"{workdir} is not the folder of a run: it has no model.json. Give a run's --workdir."
        ) from None


@dataclasses.dataclass(frozen=True)
class StoredPolicy:
    """The policy of a checkpoint, on one device.

    Attributes:
      model: the architecture, with the scalar head that is trained: none, "reward" or "value".
      policy: the parameters; adapters are merged into those that are frozen.
      trained: what the run trains: the parameters, or the adapters alone.
      objective_state: the objective's state, by name; usually {}.
    """

    model: Model
    policy: Params
    trained: Params
    objective_state: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


def find_step(workdir: Path, step: str = "last") -> int:
    """The step of a checkpoint that a run has.

    Args:
      workdir: the run's folder.
      step: "last", "best" (the best held-out figure, as config.evaluation.metric says) or a number.

    Raises:
      ConfigError: the run has no whole checkpoint, or not this one; lists those that there are.
    """
    read_model(workdir)
    found = _find_checkpoints(workdir)
    if not found:
        raise ConfigError(f"{workdir} holds no complete checkpoint yet. Train until the first one is written.")
    steps = sorted(one.step for one in found)
    if step == "last":
        return steps[-1]
    if step == "best":
        metric = _read_settings(workdir)["evaluation"].get("metric", "eval_loss")
        if measured := {one.step: one.metrics[metric] for one in found if metric in (one.metrics or {})}:
            return best_step(measured, metric)
    elif step.isdecimal() and int(step) in steps:
        return int(step)
    raise ConfigError(
        f"--step={step} is no checkpoint of {workdir}. Allowed: {', '.join(map(str, steps))}, last, and best if "
        "held-out feedback was evaluated. Set --step."
    )


def find_steps(workdir: Path) -> list[int]:
    """The steps of a run's checkpoints, in order.

    Raises:
      ConfigError: the folder holds no run, or no whole checkpoint.
    """
    find_step(workdir)
    return _find_steps(workdir)


def _find_checkpoints(workdir: Path) -> list[Any]:
    quiet_libraries()
    with ocp.training.Checkpointer(checkpoints_folder(workdir)) as checkpointer:
        return list(checkpointer.checkpoints)


def _find_steps(workdir: Path) -> list[int]:
    return sorted(one.step for one in _find_checkpoints(workdir))


def load_checkpoint(
    workdir: Path, step: str = "last", *, dtype: str = "float32", strict: bool = False
) -> tuple[int, StoredPolicy]:
    """Reads the policy of a checkpoint; if the last one is damaged, that of the one before, with a warning.

    Args:
      workdir: the run's folder.
      step: as for `find_step`. Only "last" may be replaced by an earlier one.
      dtype: what the model computes in.
      strict: whether a damaged one is refused, as it is if the run's `checkpoint.strict` is set.

    Returns:
      The step, and the policy.

    Raises:
      ConfigError: there is no such checkpoint, or no whole one; or the frozen reference is damaged.
    """
    workdir = Path(workdir).absolute()
    chosen = find_step(workdir, step)
    falls_back = step == "last" and not strict and not _is_strict(workdir)
    older = [number for number in _find_steps(workdir) if number < chosen] if falls_back else []
    findings: list[str] = []
    for number in (chosen, *reversed(older)):
        try:
            trained = _load_trained(workdir, number)
        except ConfigError as error:
            findings.append(str(error))
            continue
        for finding in findings:
            console.print(f"warning: {finding}", style="yellow")
        if findings:
            console.print(f"taking the checkpoint of step {number} instead", style="yellow")
        return number, _as_policy(workdir, *trained, dtype=dtype)
    others = f" {len(findings) - 1} older ones are damaged too." if len(findings) > 1 else ""
    raise ConfigError(
        f"{findings[0]}.{others} A whole checkpoint is needed. Choose another with --step of kto_jax.export, or "
        f"see which are whole: python -m kto_jax.verify --run={workdir}"
    )


def _load_trained(workdir: Path, step: int) -> tuple[Params, Params, dict[str, jax.Array]]:
    """What a checkpoint's run trains; the shapes of its adapters, {} if it trains whole weights; the objective's state.

    Raises:
      ConfigError: it is damaged.
    """
    quiet_libraries()
    stored = StoredTree(checkpoints_folder(workdir) / str(step))
    record = stored.record()
    metadata = stored.describe_recorded(record)
    if "policy" not in metadata:
        raise ConfigError(f"{stored.place} is damaged: it holds no policy")
    kept = metadata["policy"]
    wanted = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, metadata)
    adapters: Params = {}
    if "final_norm" not in kept:  # adapters; embedding and head may be trained beside them
        draw = functools.partial(init_adapters, read_model(workdir).abstract_params("float32"), _lora(workdir))
        adapters = jax.eval_shape(draw, jax.random.key(0))
        kept = kept | adapters
    wanted["policy"] = jax.tree.map(_on_one_device, kept)
    if metadata.get("objective_state"):
        wanted["objective_state"] = jax.tree.map(_on_one_device, metadata["objective_state"])
    loaded = stored.load(wanted)
    trained, objective_state = loaded["policy"], loaded.get("objective_state") or {}
    stored.compare(record, {"policy": trained})
    return trained, adapters, objective_state


def _as_policy(
    workdir: Path, trained: Params, adapters: Params, objective_state: dict[str, jax.Array], *, dtype: str
) -> StoredPolicy:
    model = read_model(workdir, dtype=dtype)
    head = trained.get(SCALAR_HEAD)
    if head is not None:
        kind = "reward" if "weight" in head else "value"
        model = dataclasses.replace(model, scalar_head=kind, value_tower=TOWER in head)
    if not adapters:
        return StoredPolicy(model, trained, trained, objective_state)
    lora = _lora(workdir)
    frozen = _load_base(workdir, lora, adapters)
    return StoredPolicy(model, merge_adapters(frozen, trained, lora), trained, objective_state)


def _read_settings(workdir: Path) -> dict[str, Any]:
    return dict(json.loads((workdir / "config.json").read_text(encoding="utf-8")))


def _is_strict(workdir: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # older versions had no such setting
        return bool(_read_settings(workdir)["checkpoint"]["strict"])
    return False


def _lora(workdir: Path) -> LoraConfig:
    return resolve_lora(LoraConfig(**_read_settings(workdir)["lora"]), read_model(workdir).config)


def _on_one_device(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.devices()[0]))


def _load_base(workdir: Path, lora: LoraConfig, adapters: Params) -> Params:
    """The frozen weights that a run's adapters belong to."""
    stored = StoredTree(checkpoints_folder(workdir) / "reference", is_step=False)
    kept = stored.describe()
    whole = read_model(workdir).abstract_params(_kept_dtype(kept))
    frozen = {name: whole[name] for name in kept}
    if lora.start == "continue":
        frozen = merge_adapters(frozen, adapters, lora)
    return stored.read(jax.tree.map(_on_one_device, frozen))[0]


def _kept_dtype(kept: Params) -> Any:
    """The dtype of frozen weights, from what is stored of them: a quantised matrix has a part of its dtype's name."""

    def names(node: Any) -> set[str]:
        return {*node}.union(*map(names, node.values())) if isinstance(node, dict) else set()

    found = names(kept)
    return next((kind for kind in QUANTISED if kind in found), None) or kept["embed"]["table"].dtype


def load_policy(workdir: Path, *, dtype: str = "float32", strict: bool = False) -> tuple[Model, Params, Path]:
    """Loads the policy of a run's newest whole checkpoint on one device, for sampling; see `load_checkpoint`.

    Returns:
      The model, its parameters (including a value head if it was trained with one) and its tokenizer's folder.

    Raises:
      ConfigError: the folder holds no run, no complete checkpoint, or a reward model, which has no output head.
    """
    workdir = Path(workdir).absolute()
    _, stored = load_checkpoint(workdir, dtype=dtype, strict=strict)
    if stored.model.scalar_head == "reward":
        raise ConfigError(
            f"{workdir} trains a reward model, which scores completions and generates none. A run of a language "
            "model is needed here. Choose one, or score completions with python -m kto_jax.score."
        )
    return read_model(workdir, dtype=dtype), stored.policy, workdir / "tokenizer"
