"""How many packed rows fit in a microbatch: `microbatch_rows="auto"`, found by compiling, not by running out of memory.

The step is compiled for the fewest rows that the mesh can shard, then for twice as many, and so on, until the memory
that the compiler reports no longer fits the devices, or one microbatch holds a batch. The programs are kept in the
compilation cache, where training finds the one it needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from kto_jax.config import Config, ConfigError
from kto_jax.devices import processes
from kto_jax.devices.sharding import check_rows, mesh_shape, row_parts
from kto_jax.planning.compile_step import CompiledStep, Lengths, Shape, Task, compile_for, compile_step
from kto_jax.planning.topology import LOCAL, Topology
from kto_jax.progress import console
from kto_jax.training.inputs import Inputs, make_schedules

# The rest is for the next batch and fragmentation on a device, and for the rest of the process in a host's memory.
_SHARE, _HOST_SHARE = 0.95, 0.5
_GIB = 2**30


def with_rows(config: Config, rows: int) -> Config:
    """The same run with this many rows per microbatch."""
    return dataclasses.replace(config, microbatch_rows=rows)


def candidates(config: Config, num_devices: int) -> Iterator[int]:
    """Numbers of rows to try: the fewest that the mesh can shard, and its doublings without end.

    With `mesh.sequence` devices share a row and read one row at a time (see `sharding.check_rows`): there is nothing to
    double.

    Raises:
      ConfigError: the mesh does not fit the devices.
    """
    sizes = mesh_shape(config.mesh, num_devices)
    fewest = row_parts(sizes)
    if sizes["sequence"] > 1:
        return iter([fewest])
    return (fewest * 2**doublings for doublings in itertools.count())


def usable_bytes(program: CompiledStep, topology: Topology) -> int:
    """Bytes per device that a step may use."""
    on_host = topology.chip is None and topology.devices[0].platform == "cpu"
    return int((_HOST_SHARE if on_host else _SHARE) * program.limit)


def leaves_headroom(program: CompiledStep, topology: Topology) -> bool:
    """Whether the program compiled and leaves enough memory on the devices of all processes."""
    return _on_all_processes(not program.refusal and program.total <= usable_bytes(program, topology))


def find_rows(
    numbers: Iterable[int], compile_rows: Callable[[int], CompiledStep], topology: Topology
) -> tuple[CompiledStep, str]:
    """The program with the most rows that leaves enough memory; if none does, the one with the fewest.

    Args:
      numbers: numbers of rows in ascending order; at least one.
      compile_rows: compiles the step for a number of rows.
      topology: the devices.

    Returns:
      The program, and why it has no more rows.
    """
    found: CompiledStep | None = None
    for rows in numbers:
        program = compile_rows(rows)
        if not leaves_headroom(program, topology):
            least = "at least " if program.refusal else ""
            why = f"{rows} would take {least}{program.total / _GIB:.2f} GiB"
            return (found, why) if found else (program, "the mesh can share no fewer")
        found = program
        if program.shape.microbatches == 1:
            return program, "a batch fills no more"
    assert found is not None
    return found, "devices that share a row take one at a time"


def plan_rows(config: Config, task: Task, topology: Topology, lengths: Lengths) -> tuple[CompiledStep, str]:
    """The program of a run whose rows are "auto", for `plan`, and why it has no more rows.

    Raises:
      ConfigError: mesh and model do not fit together, or an example of these lengths fits no row.
    """

    def compile_rows(rows: int) -> CompiledStep:
        return compile_step(with_rows(config, rows), task, topology, lengths)

    return find_rows(candidates(config, len(topology.devices)), compile_rows, topology)


def resolve_rows(config: Config, inputs: Inputs, workdir: Path) -> tuple[Config, Inputs]:
    """The run with its `microbatch_rows` found; writes nothing to its folder.

    A resumed run keeps the rows in its config.json, since other rows would change its numbers slightly. Other rows are
    found only if the mesh can no longer shard these, or the devices no longer have the memory. All processes find the
    same rows.

    Args:
      config: the run, whose `microbatch_rows` is "auto".
      inputs: what it reads.
      workdir: the run's folder, which need not exist.

    Raises:
      ConfigError: the devices do not have enough memory for the fewest rows.
    """
    topology = Topology(LOCAL, tuple(jax.devices()))
    on_host = topology.devices[0].platform == "cpu"
    # Processes on one host share its memory; accelerators have their own.
    sharing = processes.exchange_text(platform.node()).count(platform.node()) if on_host else 1

    def compile_rows(rows: int) -> CompiledStep:
        program = processes.call_on_all(lambda: _compile(with_rows(config, rows), inputs, topology))
        return dataclasses.replace(program, limit=program.limit // sharing)

    program, why = None, "as the run began"
    before = int(processes.exchange_text(str(_recorded_rows(workdir)))[0])
    if before and _mesh_shards_rows(config, before, len(topology.devices)):
        program = compile_rows(before)
    if program is None or not leaves_headroom(program, topology):
        program, why = find_rows(candidates(config, len(topology.devices)), compile_rows, topology)
    _check_fits(program, why)
    console.print(
        f"microbatch_rows: {program.shape.rows}, for which the step takes {program.total / _GIB:.2f} of "
        f"{program.limit / _GIB:.2f} GiB on each device; {why}",
        highlight=False,
        soft_wrap=True,
    )
    resolved = with_rows(config, program.shape.rows)
    schedule, held_out = make_schedules(resolved, inputs.index, inputs.objective, inputs.controls)
    return resolved, dataclasses.replace(inputs, schedule=schedule, held_out=held_out)


def _recorded_rows(workdir: Path) -> int:
    """Rows of the run that is resumed; 0 if there is none."""
    try:
        return int(json.loads((workdir / "config.json").read_text(encoding="utf-8"))["microbatch_rows"])
    except FileNotFoundError:
        return 0


def _mesh_shards_rows(config: Config, rows: int, num_devices: int) -> bool:
    try:
        check_rows(rows, mesh_shape(config.mesh, num_devices))
    except ConfigError:
        return False
    return True


def _check_fits(program: CompiledStep, why: str) -> None:
    if not _on_all_processes(program.fits):
        least, needed, limit = "at least " if program.refusal else "", program.total / _GIB, program.limit / _GIB
        raise ConfigError(
            f'config.microbatch_rows="auto" finds none that fit: with {program.shape.rows} rows the step needs {least}'
            f"{needed:.2f} GiB of each device, and {why}. Allowed: up to the {limit:.2f} GiB that a device has. Take "
            "more devices, or settings that need less: python -m kto_jax.plan --topology=local finds some."
        )


def _on_all_processes(condition: bool) -> bool:
    """Whether it holds on all processes: devices of one kind may still report different limits."""
    return all(word == "True" for word in processes.exchange_text(str(condition)))


def _compile(config: Config, inputs: Inputs, topology: Topology) -> CompiledStep:
    """The step for the longest rows of the run, which take the most memory."""
    schedule, _ = make_schedules(config, inputs.index, inputs.objective, inputs.controls)
    batch, row = schedule.batch(0), schedule.longest_row
    shape = Shape(
        rows=schedule.microbatch_rows,
        row_length=row.length,
        completion_length=row.completion_length,
        slots=row.slots,
        room=len(batch.matched.tokens),
        microbatches=int(max(batch.num_matched, batch.num_unmatched)),
        sequences=schedule.max_sequences,
    )
    # The count of work is not used here.
    least = Lengths(total=2, completion=1)
    task = Task(inputs.architecture, inputs.objective)
    return compile_for(config, task, topology, shape, least, num_steps=inputs.num_steps)
