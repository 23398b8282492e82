"""Settings that need less memory, added one after the other until the step fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from kto_jax.config import Config, ConfigError
from kto_jax.devices.sharding import mesh_shape
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


def climb(program: CompiledStep, task: Task, topology: Topology, lengths: Lengths) -> Iterator[Rung]:
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
    for change, setting, cost in _settings(task, topology):
        changed = change(config, num_devices)
        if changed == config:
            continue
        text = setting(changed)
        try:
            check_conflicts(changed, task.objective)
            tried = compile_step(changed, task, topology, lengths)
        except ConfigError as error:
            yield Rung(text, cost, None, str(error))
            continue
        config = changed
        yield Rung(text, cost, tried)
        if tried.fits:
            return


_Change = Callable[[Config, int], Config]


def _settings(task: Task, topology: Topology) -> list[tuple[_Change, Callable[[Config], str], str]]:
    """(change, text on the command line, cost) of each setting, in the order in which they are tried."""
    settings: list[tuple[_Change, Callable[[Config], str], str]] = [
        (
            _full_remat,
            lambda _: "model.remat=full",
            "activation checkpointing: recomputes each layer in the backward pass",
        ),
        (
            _fewest_rows,
            lambda config: f"microbatch_rows={config.microbatch_rows}",
            "more microbatches, and weights gathered for each",
        ),
        (
            _widest_fsdp,
            lambda config: f"mesh.data=1 mesh.fsdp={config.mesh.fsdp}",
            "weights gathered from more devices",
        ),
        *_offloading(topology),
        (
            _split_rows,
            lambda config: (
                f"mesh.fsdp={config.mesh.fsdp} mesh.sequence={_ROW_PARTS} microbatch_rows={config.microbatch_rows}"
            ),
            "sequence parallel: an all-to-all of heads in each layer, and more microbatches",
        ),
        (
            lambda config, _: dataclasses.replace(
                config, optimizer=dataclasses.replace(config.optimizer, moments_dtype="bfloat16")
            ),
            lambda _: "optimizer.moments_dtype=bfloat16",
            "both moments stochastically rounded",
        ),
    ]
    if task.objective.uses_reference:
        settings += [
            (
                _bfloat16_reference,
                lambda _: "reference.param_dtype=bfloat16",
                "the reference's weights rounded to bfloat16",
            ),
            (
                lambda config, _: dataclasses.replace(
                    config, reference=dataclasses.replace(config.reference, precompute=True)
                ),
                lambda _: "reference.precompute=True",
                "one pass of the reference over all feedback before training",
            ),
        ]
    settings.append(
        (
            _bfloat16_policy,
            lambda _: "model.param_dtype=bfloat16",
            "the policy stochastically rounded in every update",
        )
    )
    settings += [
        (
            _adapters,
            lambda config: f"lora.rank={config.lora.rank} model.param_dtype=float32",
            "trains LoRA adapters instead of the weights",
        ),
        (
            _int8_frozen,
            lambda _: "reference.param_dtype=int8",
            "the frozen weights quantized to int8",
        ),
    ]
    return settings


def _offloading(topology: Topology) -> list[tuple[_Change, Callable[[Config], str], str]]:
    """Offloading of saved activations to the host, for devices that have memory of their own."""
    if topology.devices[0].platform not in ("tpu", "gpu"):
        return []
    return [
        (
            lambda config, _: dataclasses.replace(config, model=dataclasses.replace(config.model, remat="offload")),
            lambda _: "model.remat=offload",
            "copies the inputs of layers to the host and back",
        )
    ]


def _adapters(config: Config, _: int) -> Config:
    if config.lora.rank:
        return config
    return dataclasses.replace(
        config,
        lora=dataclasses.replace(config.lora, rank=_RANK),
        model=dataclasses.replace(config.model, param_dtype="float32"),
    )


def _int8_frozen(config: Config, _: int) -> Config:
    if not config.lora.rank:  # The setting before was refused.
        return config
    return dataclasses.replace(config, reference=dataclasses.replace(config.reference, param_dtype="int8"))


def _bfloat16_reference(config: Config, _: int) -> Config:
    if config.reference.param_dtype == "int8":  # needs even less
        return config
    return dataclasses.replace(config, reference=dataclasses.replace(config.reference, param_dtype="bfloat16"))


def _bfloat16_policy(config: Config, _: int) -> Config:
    if config.lora.rank:  # Adapters are float32, and small.
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16"))


def _full_remat(config: Config, _: int) -> Config:
    if config.model.remat == "offload":  # needs even less
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))


def _fewest_rows(config: Config, num_devices: int) -> Config:
    """One row per device of the axes that rows are sharded over."""
    sizes = mesh_shape(config.mesh, num_devices)
    return dataclasses.replace(config, microbatch_rows=sizes["data"] * sizes["fsdp"])


def _widest_fsdp(config: Config, num_devices: int) -> Config:
    sizes = mesh_shape(config.mesh, num_devices)
    if sizes["data"] == 1:
        return config
    return dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=sizes["data"] * sizes["fsdp"])
    )


def _split_rows(config: Config, num_devices: int) -> Config:
    """Each row shared by `_ROW_PARTS` devices, if the mesh allows it."""
    sizes = mesh_shape(config.mesh, num_devices)
    if sizes["sequence"] > 1 or sizes["fsdp"] % _ROW_PARTS:
        return config
    fsdp = sizes["fsdp"] // _ROW_PARTS
    mesh = dataclasses.replace(config.mesh, fsdp=fsdp, sequence=_ROW_PARTS)
    return dataclasses.replace(config, mesh=mesh, microbatch_rows=sizes["data"] * fsdp)
