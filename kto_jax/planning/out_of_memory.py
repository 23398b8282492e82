"""What a run says when its devices are out of memory: the settings with which its step fits them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from kto_jax.config import Config, OutOfMemory
from kto_jax.devices import processes
from kto_jax.planning.compile_step import CompiledStep, Lengths, Task, compile_step
from kto_jax.planning.smaller_settings import try_settings
from kto_jax.planning.topology import LOCAL, Topology
from kto_jax.progress import console
from kto_jax.training.inputs import Inputs

_GIB = 2**30


@contextlib.contextmanager
def explained_out_of_memory(config: Config, inputs: Inputs) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED, while compiling or running, into an error that names settings that fit.

    Raises:
      OutOfMemory: the devices are out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).splitlines()[0]
        console.print("out of memory; looking for settings that need less …")
        raise OutOfMemory(f"the devices are out of memory: {why}. {_advice(config, inputs)}") from error


def _advice(config: Config, inputs: Inputs) -> str:
    length = inputs.schedule.longest_row.length
    given = (
        f"The run has config.microbatch_rows={config.microbatch_rows}, rows of {length} tokens, "
        f"model.remat={config.model.remat} and mesh {dataclasses.asdict(config.mesh)}."
    )
    kept = (
        f"config.batch_size={config.batch_size} may stay: its microbatches run one after the other. No checkpoint was "
        "overwritten."
    )
    if processes.num_processes() > 1:
        # All processes would have to compile together, and those that have memory are still running.
        return f"{given} `python -m kto_jax.plan --topology=...` finds settings that fit. {kept}"
    # The failed step may have run with an automatic length.
    config = dataclasses.replace(config, row_length=length)
    task, topology = Task(inputs.architecture, inputs.objective), Topology(LOCAL, tuple(jax.devices()))
    lengths = _half_full(config)
    program = compile_step(config, task, topology, lengths)
    settings: dict[str, str] = {}
    tried = program
    for rung in try_settings(program, task, topology, lengths):
        if rung.program is not None:
            tried = rung.program
            settings |= dict(field.split("=") for field in rung.setting.split())
    if not tried.fits:
        shorter = _halved(tried.config)
        tried = compile_step(shorter, task, topology, _half_full(shorter))
        settings |= {"data.max_length": str(shorter.data.max_length), "row_length": str(shorter.row_length)}
    text = " ".join(f"--config.{name}={value}" for name, value in settings.items())
    found = f"It fits with {text}" if tried.fits else f"Not even {text} makes it fit: take more devices. It then needs"
    return f"{given} Its step needs {_needs(program)}. {found} ({_needs(tried)}). {kept}"


def _half_full(config: Config) -> Lengths:
    """Examples of half the longest length, half of them completion, as `plan` assumes."""
    total = max(config.data.max_length // 2, 2)
    return Lengths(total, max(total // 2, 1))


def _halved(config: Config) -> Config:
    data = dataclasses.replace(config.data, max_length=max(config.data.max_length // 2, 4))
    if data.max_prompt_length:
        data = dataclasses.replace(data, max_prompt_length=min(data.max_prompt_length, data.max_length // 2))
    assert isinstance(config.row_length, int)
    return dataclasses.replace(config, data=data, row_length=max(config.row_length // 2, data.max_length))


def _needs(program: CompiledStep) -> str:
    least = "at least " if program.refusal else ""
    return f"{least}{program.total / _GIB:.3g} of {program.limit / _GIB:.3g} GiB on each device"
