"""Settings that need less memory, added one after the other until the step fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kto_jax.config import Config, ConfigError
from kto_jax.devices.sharding import mesh_shape, row_parts
from kto_jax.models.quantised import QUANTISED
from kto_jax.planning.compile_step import CompiledStep, Lengths, Task, compile_step
from kto_jax.planning.topology import Topology
from kto_jax.training.checks import check_conflicts

# Devices that share a row if it is too long for one device.
_ROW_PARTS = 8
_RANK = 16


@dataclasses.dataclass(frozen=True)
class Rung:
    """One setting that was tried, and its result.

    Attributes:
      setting: as on the command line; the settings of all rungs before apply too.
      cost: what it costs instead of memory.
      program: the step compiled with it; None if the run refuses the setting.
      why_not: the refusal; empty if there is a program.
    """

    setting: str
    cost: str
    program: CompiledStep | None
    why_not: str = ""


_Change = Callable[[Config, int], Config]


class _Setting(NamedTuple):
    """A setting that needs less memory.

    Attributes:
      change: (run, number of devices) -> the run with the setting; the run itself if the setting changes nothing.
      text: the setting on the command line, a format string of the changed `config`.
      cost: what it costs instead of memory.
    """

    change: _Change
    text: str
    cost: str


def try_settings(program: CompiledStep, task: Task, topology: Topology, lengths: Lengths) -> Iterator[Rung]:
    """Compiles the step with one more setting at a time, the cheapest first, until it fits.

    Args:
      program: one that does not fit.
      task: what is trained.
      topology: the devices.
      lengths: of the assumed feedback.

    Yields:
      A rung for each setting that changes something.
    """
    config = program.config
    num_devices = len(topology.devices)
    for setting in _settings(task, topology):
        changed = setting.change(config, num_devices)
        if changed == config:
            continue
        text = setting.text.format(config=changed)
        try:
            check_conflicts(changed, task.objective)
            tried = compile_step(changed, task, topology, lengths)
        except ConfigError as error:
            yield Rung(text, setting.cost, None, str(error))
            continue
        config = changed
        yield Rung(text, setting.cost, tried)
        if tried.fits:
            return


def _settings(task: Task, topology: Topology) -> list[_Setting]:
    """The settings that apply, in the order in which they are tried."""
    unavailable = set[_Change]()
    if topology.devices[0].platform not in ("tpu", "gpu"):  # Other devices use the host's memory.
        unavailable |= {_offload}
    if not task.objective.uses_reference:
        unavailable |= {_bfloat16_reference, _precompute}
    return [setting for setting in _SETTINGS if setting.change not in unavailable]


def _with(config: Config, section: str, **fields: Any) -> Config:
    """The run with fields of one section replaced."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def _full_remat(config: Config, _: int) -> Config:
    needs_less = config.model.remat == "offload"
    return config if needs_less else _with(config, "model", remat="full")


def _fewest_rows(config: Config, num_devices: int) -> Config:
    """One row per device of the axes that rows are sharded over."""
    sizes = mesh_shape(config.mesh, num_devices)
    return dataclasses.replace(config, microbatch_rows=row_parts(sizes))


def _widest_fsdp(config: Config, num_devices: int) -> Config:
    sizes = mesh_shape(config.mesh, num_devices)
    if sizes["data"] == 1:
        return config
    return _with(config, "mesh", data=1, fsdp=sizes["data"] * sizes["fsdp"])


def _offload(config: Config, _: int) -> Config:
    return _with(config, "model", remat="offload")


def _split_rows(config: Config, num_devices: int) -> Config:
    """Each row shared by `_ROW_PARTS` devices, if the mesh allows it."""
    sizes = mesh_shape(config.mesh, num_devices)
    if sizes["sequence"] > 1 or sizes["fsdp"] % _ROW_PARTS:
        return config
    fsdp = sizes["fsdp"] // _ROW_PARTS
    config = _with(config, "mesh", fsdp=fsdp, sequence=_ROW_PARTS)
    return dataclasses.replace(config, microbatch_rows=row_parts(sizes) // _ROW_PARTS)


def _bfloat16_moments(config: Config, _: int) -> Config:
    return _with(config, "optimizer", moments_dtype="bfloat16")


def _bfloat16_reference(config: Config, _: int) -> Config:
    needs_less = config.reference.param_dtype in QUANTISED
    return config if needs_less else _with(config, "reference", param_dtype="bfloat16")


def _precompute(config: Config, _: int) -> Config:
    return _with(config, "reference", precompute=True)


def _bfloat16_policy(config: Config, _: int) -> Config:
    if config.lora.rank:  # Adapters are float32, and small.
        return config
    return _with(config, "model", param_dtype="bfloat16")


def _adapters(config: Config, _: int) -> Config:
    if config.lora.rank:
        return config
    return _with(_with(config, "lora", rank=_RANK), "model", param_dtype="float32")


def _int8_frozen(config: Config, _: int) -> Config:
    if not config.lora.rank:  # The setting before was refused.
        return config
    needs_less = config.reference.param_dtype in QUANTISED
    return config if needs_less else _with(config, "reference", param_dtype="int8")


def _nf4_frozen(config: Config, _: int) -> Config:
    if not config.lora.rank or config.reference.param_dtype == "int4":
        return config
    return _with(config, "reference", param_dtype="nf4")


_SETTINGS = (
    _Setting(_full_remat, "model.remat=full", "activation checkpointing: recomputes each layer in the backward pass"),
    _Setting(
        _fewest_rows,
        "microbatch_rows={config.microbatch_rows}",
        "more microbatches, and weights gathered for each",
    ),
    _Setting(_widest_fsdp, "mesh.data=1 mesh.fsdp={config.mesh.fsdp}", "weights gathered from more devices"),
    _Setting(_offload, "model.remat=offload", "copies the inputs of layers to the host and back"),
    _Setting(
        _split_rows,
        "mesh.fsdp={config.mesh.fsdp} mesh.sequence={config.mesh.sequence} microbatch_rows={config.microbatch_rows}",
        "sequence parallel: an all-to-all of heads in each layer, and more microbatches",
    ),
    _Setting(_bfloat16_moments, "optimizer.moments_dtype=bfloat16", "both moments stochastically rounded"),
    _Setting(_bfloat16_reference, "reference.param_dtype=bfloat16", "the reference's weights rounded to bfloat16"),
    _Setting(_precompute, "reference.precompute=True", "one pass of the reference over all feedback before training"),
    _Setting(_bfloat16_policy, "model.param_dtype=bfloat16", "the policy stochastically rounded in every update"),
    _Setting(
        _adapters,
        "lora.rank={config.lora.rank} model.param_dtype=float32",
        "trains LoRA adapters instead of the weights",
    ),
    _Setting(_int8_frozen, "reference.param_dtype=int8", "the frozen weights quantized to int8"),
    _Setting(_nf4_frozen, "reference.param_dtype=nf4", "the layers' frozen weights quantized to four bits (QLoRA)"),
)
"""All settings, in the order in which they are tried."""
