"""Checks all that a run has written, or a model, for damage: reads everything, changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from kto_jax.config import ConfigError
from kto_jax.data.tokens.tokenizer_files import TOKENIZER
from kto_jax.models.finite import find_nonfinite
from kto_jax.models.weights.adapter_folder import CONFIG, WEIGHTS, is_adapter_folder, read_adapter_folder
from kto_jax.models.weights.load import open_weights, read_config
from kto_jax.models.weights.safetensors_files import SafetensorsWeights
from kto_jax.storage.run_place import ORIGIN, checkpoints_folder
from kto_jax.storage.sums import damage_of, has_sums
from kto_jax.training.checkpoint_reading import StoredTree, combined, groups, quiet_libraries, shown
from kto_jax.training.leaf_digests import differing, digest_leaves, named_leaves
from kto_jax.training.logs import read_metrics
from kto_jax.training.run_folder import check_history

WHOLE, READABLE, DAMAGED, SKIPPED = "whole", "readable", "DAMAGED", "not checked"
"""What is found of a part. A readable one was written without digests: logs always, the others by earlier versions."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is found of one part of a run or a model.

    Attributes:
      part: its path in the folder.
      state: WHOLE, READABLE, DAMAGED or SKIPPED.
      detail: how much was checked, or what is wrong.
    """

    part: str
    state: str
    detail: str


def verify_run(run: Path) -> Iterator[Finding]:
    """Checks a run's folder, part by part; see `Finding`.

    Args:
      run: the folder, or a copy of one in a bucket, whose checkpoints are read where `checkpoints_folder` says.

    Raises:
      ConfigError: the folder holds no run.
      TransientError: a bucket cannot be reached for now.
    """
    if not (run / "config.json").exists():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.json. Give a run's --workdir.")
    yield from _verify_settings(run)
    steps = list[int]()
    yield from _verify_checkpoints(checkpoints_folder(run.absolute()), steps)
    if (run / "metrics.jsonl").exists() or steps:
        yield _finding(
            "metrics.jsonl", lambda: _read_metrics(run / "metrics.jsonl", max(steps, default=0)), checked=False
        )
    exports = sorted((run / "exports").iterdir()) if (run / "exports").is_dir() else []
    for folder in (run / "policy", run / "adapter", *exports):
        if folder.is_dir() and any(folder.iterdir()):
            yield from _verify_folder(folder, folder.relative_to(run).as_posix())
    if (run / ORIGIN).exists():
        yield Finding("exports/", SKIPPED, "not copied from the bucket; give such a folder as --model")


def verify_model(path: Path) -> Iterator[Finding]:
    """Checks a model: a Hugging Face directory, a folder of adapters or a .gguf file."""
    yield from _verify_folder(path, path.name or str(path))


def _verify_settings(run: Path) -> Iterator[Finding]:
    checked = has_sums(run)
    for name in ("config.json", "manifest.json", "model.json"):
        yield _finding(name, functools.partial(_read_setting, run, name), checked=checked)
    yield _finding("tokenizer/", functools.partial(_read_tokenizer, run), checked=checked)
    if (run / "config_history.jsonl").exists():
        yield _finding("config_history.jsonl", lambda: check_history(run), checked=False)


def _read_setting(run: Path, name: str) -> str:
    _refuse(damage_of(run, lambda file: file == name))
    try:
        values = json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} holds no JSON object")
    return f"{len(values)} entries"


def _read_tokenizer(run: Path) -> str:
    _refuse(damage_of(run, lambda file: file.startswith("tokenizer/")))
    if not (run / "tokenizer" / TOKENIZER).is_file():
        raise ConfigError(f"tokenizer/{TOKENIZER} is missing")
    return f"{len(list((run / 'tokenizer').iterdir()))} files"


def _refuse(damage: str) -> None:
    """Raises a ConfigError if there is any damage."""
    if damage:
        raise ConfigError(damage)


def _finding(part: str, check: Callable[[], str], *, checked: bool = True) -> Finding:
    """What a function finds that describes a part, or raises a ConfigError."""
    try:
        return Finding(part, WHOLE if checked else READABLE, check())
    except ConfigError as error:
        return Finding(part, DAMAGED, str(error))


def _read_metrics(path: Path, last_saved: int) -> str:
    """Describes the rows of steps; a run that is resumed needs those up to its newest checkpoint."""
    steps = [row["step"] for row in read_metrics(path)]
    expected = range(1, max([last_saved, *steps]) + 1)
    if steps != list(expected):
        odd = sorted(set(expected) - set(steps)) or [step for step in expected if steps.count(step) != 1] or steps
        raise ConfigError(f"it must have one row for each step from 1 to {len(expected)}, in order; see step {odd[0]}")
    return f"{len(steps)} steps"


# ---------------------------------------------------------------------------------------------------- checkpoints
def _verify_checkpoints(folder: epath.Path, steps: list[int]) -> Iterator[Finding]:
    """Checks the reference and every checkpoint; appends the steps of those that are whole."""
    quiet_libraries()
    names = sorted(path.name.rstrip("/") for path in folder.iterdir()) if folder.exists() else []
    reference = "" if "reference" in names else None
    if "reference" in names:
        stored = StoredTree(folder / "reference", is_step=False)
        yield _verify_tree("checkpoints/reference", stored)
        with contextlib.suppress(ConfigError):  # just reported
            reference = combined(stored.record().get("digests", {}))
    for step in sorted(int(name) for name in names if name.isdecimal()):
        finding = _verify_tree(f"checkpoints/{step}", StoredTree(folder / str(step)), reference)
        if finding.state != DAMAGED:
            steps.append(step)
        yield finding
    for name in names:
        if ".damaged" in name:
            yield Finding(f"checkpoints/{name}", SKIPPED, "was set aside when the run was resumed; nothing reads it")
    if not any(name.isdecimal() for name in names):
        yield Finding("checkpoints/", SKIPPED, "no checkpoint is written yet")


def _verify_tree(part: str, stored: StoredTree, reference: str | None = "") -> Finding:
    """Checks arrays and that they belong to a reference: its digest, "" if that is unknown, None if there is none."""
    try:
        record, size = check_tree(stored)
        belongs = record.get("reference", "")
        if belongs and reference != "" and belongs != reference:
            found = "missing" if reference is None else reference
            raise ConfigError(f"it belongs to reference {belongs}, and checkpoints/reference is {found}")
    except ConfigError as error:
        return Finding(part, DAMAGED, str(error))
    if not record:
        return Finding(part, READABLE, f"{size / 1e6:,.1f} MB can be read")
    mark = "" if not stored.is_step or stored.is_verified() else "; was not read back when it was written"
    return Finding(part, WHOLE, f"{len(record['digests'])} arrays, {size / 1e6:,.1f} MB{mark}")


def check_tree(stored: StoredTree) -> tuple[dict[str, Any], int]:
    """Reads all arrays of a checkpoint or of a reference, group by group, and compares their digests.

    Returns:
      What was recorded when it was written, {} by versions without digests; and the bytes of the arrays.

    Raises:
      ConfigError: naming what cannot be read, differs, or is not finite.
    """
    record = stored.record()
    described = stored.describe_recorded(record)
    place = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), described)
    names, (leaves, structure) = list(named_leaves(wanted)), jax.tree.flatten(wanted)
    digests: dict[str, str] = record.get("digests", {})
    size = 0
    for group in groups(leaves):
        chosen = [leaf if number in group else ocp.PLACEHOLDER for number, leaf in enumerate(leaves)]
        arrays = jax.tree.leaves(stored.load(jax.tree.unflatten(structure, chosen)))
        found = {names[number]: arrays[number] for number in group}
        size += sum(array.nbytes for array in found.values())
        if record and (broken := differing(digests, digest_leaves(found))):
            raise ConfigError(f"the digest of {shown(broken)} is not the one recorded when it was saved")
        if broken := find_nonfinite(found):
            raise ConfigError(f"values are NaN or infinite in {shown(broken)}")
    return record, size


# ---------------------------------------------------------------------------------------------------- models
def _verify_folder(path: Path, part: str) -> Iterator[Finding]:
    """A model's files against their digests; the tensors of one without digests are read."""
    if path.is_dir() and has_sums(path):
        yield _finding(part, functools.partial(_read_export, path))
        return
    is_of_gguf = path.is_dir() and not any((path / name).exists() for name in ("config.json", CONFIG))
    for file in sorted(path.glob("*.gguf")) if is_of_gguf else [path]:
        name = part if file == path else f"{part}/{file.name}"
        yield _finding(name, functools.partial(_read_tensors, file), checked=False)


def _read_export(folder: Path) -> str:
    _refuse(damage_of(folder))
    return f"{sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6:,.1f} MB"


def _read_tensors(path: Path) -> str:
    """Reads every tensor of a model without digests.

    Raises:
      ConfigError: a file cannot be read, or a value is not finite.
    """
    if path.is_dir() and is_adapter_folder(path):
        read_adapter_folder(path)
        weights: Any = SafetensorsWeights(path, WEIGHTS)
    else:
        read_config(path)
        weights = open_weights(path)
    broken, size = [], 0
    for name, shape in weights.shapes.items():
        values = weights.read(name, (slice(None),) * len(shape))
        size += values.nbytes
        if not np.isfinite(values).all():
            broken.append(name)
    if broken:
        raise ConfigError(f"values are NaN or infinite in {shown(broken)}")
    return f"{len(weights.shapes)} tensors, {size / 1e6:,.1f} MB can be read"
