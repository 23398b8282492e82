"""Says whether a run fits and how fast it can be: python -m kto_jax.plan --config=kto_llama --topology=v5e:4x4

Compiles the training step ahead of time for TPUs without having any (extra [plan]: libtpu), or with --topology=local
for the devices of this machine, and prints the memory per device, the collectives, and bounds on time and cost. If it
does not fit, compiles again with settings that need less memory, and prints those that fit. Nothing runs: all figures
come from the compiler or from formulas.

Exit codes: 0 it fits, 3 it does not, 2 the command, the configuration or the model cannot be used.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
from rich.console import Console

from kto_jax.command import run_command
from kto_jax.config import Config, ConfigError
from kto_jax.config.ranges import Positive, Range
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.planning.compile_step import Lengths, compile_step, read_task
from kto_jax.planning.report import as_dict, show, show_ladder
from kto_jax.planning.rows_that_fit import plan_rows
from kto_jax.planning.sampling_memory import sampling_bytes
from kto_jax.planning.smaller_settings import try_settings
from kto_jax.planning.topology import LOCAL, open_topology

FITS, DOES_NOT_FIT = 0, 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    config: Config
    """Recipe of configs/ by its name, or the path of a config file."""
    topology: str
    """v4, v5e, v5p, v6e or tpu7x and a size: v5e:4x4, v5p:4x4x4, or N*v5e:16x16 for N slices; or local."""
    mean_length: Annotated[int, Range(at_least=2)] | None = None
    """Mean tokens of an example, prompt and completion. Default: half of data.max_length."""
    mean_completion: Annotated[int, Range(at_least=1)] | None = None
    """Mean tokens of its completion. Default: half of the mean length."""
    price_per_chip_hour: Positive | None = None
    """Adds the least cost of a million tokens, in the price's currency."""
    sampled: Annotated[int, Range(at_least=0, zero="none")] = 0
    """Completions that online training samples at once over the mesh: adds the memory of sampling, with its cache."""
    json: str = ""
    """File to write all figures to."""
    ladder: bool = True
    """If the run does not fit, look for settings that do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(plan, Options, str(__doc__), arguments)


def plan(given: Options) -> int:
    """Plans a run; the exit code says whether it fits.

    Raises:
      ConfigError: the command, the configuration or the model cannot be used.
    """
    config = given.config
    lengths = _lengths(given)
    task = read_task(config)
    use_most_gpu_memory()
    if given.topology != LOCAL:
        # libtpu would otherwise claim this machine's chips, perhaps from a run.
        jax.config.update("jax_platforms", "cpu")
    topology = open_topology(given.topology)
    console = Console(highlight=False)
    if config.microbatch_rows == "auto":
        program, why = plan_rows(config, task, topology, lengths)
        console.print(f"microbatch_rows: {program.shape.rows}; {why}", soft_wrap=True)
    else:
        program = compile_step(config, task, topology, lengths)
    if given.sampled:
        memory = sampling_bytes(program.config, task, topology.devices, given.sampled)
        program = dataclasses.replace(program, sampling=memory)
    show(program, topology, lengths, given.price_per_chip_hour, console)
    rungs = []
    if not program.fits and given.ladder:
        rungs = list(try_settings(program, task, topology, lengths))
        show_ladder(program, rungs, console)
    if given.json:
        figures = as_dict(program, topology, lengths, given.price_per_chip_hour, rungs)
        Path(given.json).write_text(json.dumps(figures, indent=1) + "\n")
    return FITS if program.fits else DOES_NOT_FIT


def _lengths(given: Options) -> Lengths:
    max_length = given.config.data.max_length
    total = given.mean_length or max_length // 2
    completion = given.mean_completion or max(total // 2, 1)
    if total > max_length or completion >= total:
        raise ConfigError(
            f"--mean_length={total} and --mean_completion={completion} do not go together. Allowed: a mean length from "
            f"2 to config.data.max_length={max_length}, and a shorter completion. Set --mean_length and "
            "--mean_completion."
        )
    return Lengths(total, completion)


if __name__ == "__main__":
    sys.exit(main())
