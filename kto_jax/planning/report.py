"""The report of a plan: memory per device, collectives, and bounds on time and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kto_jax.devices.chips import peak_flops
from kto_jax.planning.compile_step import CompiledStep, Lengths
from kto_jax.planning.hlo import summarize
from kto_jax.planning.smaller_settings import Rung
from kto_jax.planning.topology import Topology

_MAX_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower bounds on the time of a step, in seconds.

    Attributes:
      compute: by the peak rate of the devices, without recomputation.
      memory: by the memory's bandwidth: each pass reads its weights once, and the update reads and writes the policy
        and the moments; None if the bandwidth is not published.
      network: by the links of a slice, with each collective at its fewest bytes; None likewise.
      slices: by the network between slices; None likewise.
      exposed: the part of `network` during which the devices compute nothing; None likewise.
    """

    compute: float
    memory: float | None
    network: float | None
    slices: float | None
    exposed: float | None

    @property
    def seconds(self) -> float:
        """The largest of them: at best everything else overlaps with computation."""
        waiting = self.exposed or 0.0
        return max(self.compute + waiting, self.memory or 0.0, self.network or 0.0, self.slices or 0.0)


def find_bounds(program: CompiledStep, topology: Topology) -> Bounds:
    """The bounds of a step, from the chip's published figures; for local devices from the peak rate alone."""
    num_devices = len(topology.devices)
    if topology.chip is None:
        peak, _ = peak_flops(topology.devices[0], program.config.model.dtype)
        return Bounds(program.flops / (peak * num_devices), None, None, None, None)
    chip = topology.chip
    rows = summarize(list(program.collectives), unknown=program.shape.microbatches)
    within = sum(row["bytes"] for row in rows if not row["crosses_slices"])
    across = sum(row["bytes"] for row in rows if row["crosses_slices"])
    exposed = sum(row["bytes"] for row in rows if not row["overlaps"])
    links = chip.ici_bandwidth / chip.devices
    state = program.parts["reference"] + 2 * (program.parts["policy"] + program.parts["moments"])
    read = program.passes * program.weight_bytes
    return Bounds(
        compute=program.flops / (chip.peak_flops / chip.devices * num_devices),
        memory=(state + read) / (chip.hbm_bandwidth / chip.devices),
        network=within / links,
        slices=across / (chip.dcn_bandwidth / chip.devices) if chip.dcn_bandwidth else None,
        exposed=exposed / links,
    )


def cost_per_million(seconds: float, tokens: float, num_chips: int, price_per_chip_hour: float) -> float:
    """Price of training on a million tokens, in the currency of the price.

    Args:
      seconds: per step.
      tokens: per step.
      num_chips: chips that are paid.
      price_per_chip_hour: price.
    """
    return num_chips * price_per_chip_hour * seconds / 3600 / tokens * 1e6


# ------------------------------------------------------------------------------------------------ for people


def show(program: CompiledStep, topology: Topology, lengths: Lengths, price: float | None, console: Console) -> None:
    """Prints a plan."""
    shape, config = program.shape, program.config
    console.print(
        f"{config.model.path} for {topology.name}: {topology.num_chips} chips, {len(topology.devices)} devices as "
        f"{program.mesh}",
        soft_wrap=True,
        markup=False,
    )
    console.print(
        f"assumed: {config.batch_size} examples per step, each of {lengths.total} tokens, {lengths.completion} of them "
        f"completion; this takes {shape.microbatches} microbatches of {shape.rows} rows of {shape.row_length} tokens "
        f"({shape.slots} slots), for matched and for unmatched completions",
        soft_wrap=True,
    )
    if program.active_params < program.params:
        console.print(
            f"a mixture of experts: {program.params / 1e9:.2f}e9 parameters, of which a token passes through "
            f"{program.active_params / 1e9:.2f}e9; operations count these",
            soft_wrap=True,
        )
    console.print(_memory_table(program))
    if program.refusal:
        console.print(f"refused: {program.refusal}", soft_wrap=True, markup=False)
    else:
        console.print(_collectives_table(program))
        if program.gradient_bytes:
            console.print(_reduction(program), soft_wrap=True, markup=False)
        console.print(_bounds_table(program, topology, price))
    console.print(
        f"compiled in {program.compile_seconds:.1f} s; peak memory of this process {_size(program.host_bytes)}. "
        "All figures come from the compiler and from formulas: nothing ran.",
        soft_wrap=True,
    )
    verdict = "fits" if program.fits else "does not fit"
    console.print(f"{verdict}: {_needs(program)} of {_size(program.limit)} on each device", style="bold")


def show_ladder(program: CompiledStep, rungs: Sequence[Rung], console: Console) -> None:
    """Prints the settings that were tried, and those that fit."""
    table = Table(
        title="settings that need less memory, each added to those above it", title_justify="left", title_style="bold"
    )
    for name, justify in (("config.", "left"), ("a device needs", "right"), ("fits", "left"), ("costs", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_row("as given", _needs(program), "no", "")
    for rung in rungs:
        if rung.program is None:
            table.add_row(rung.setting, "-", "refused", rung.why_not)
        else:
            table.add_row(rung.setting, _needs(rung.program), "yes" if rung.program.fits else "no", rung.cost)
    console.print(table)
    fitting = [rung for rung in rungs if rung.program and rung.program.fits]
    if fitting:
        # If two rungs set a field, the later one counts.
        settings = dict(field.split("=") for rung in rungs if rung.program for field in rung.setting.split())
        text = " ".join(f"{name}={value}" for name, value in settings.items())
        console.print(f"it fits with {text}", soft_wrap=True, markup=False)
    else:
        console.print("none of these makes it fit: take more chips, chips with more memory, or a smaller model")


def _memory_table(program: CompiledStep) -> Table:
    table = Table(title="memory per device", title_justify="left", title_style="bold", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, size in program.parts.items():
        table.add_row(name, _size(size))
    if program.arguments is not None:
        table.add_row("padding of the compiler's layout", _size(program.arguments - sum(program.parts.values())))
    table.add_row("gradients, activations, gathered weights, code", _size(program.temporaries))
    table.add_section()
    table.add_row("total" + (" at least" if program.refusal else ""), _size(program.total))
    if program.sampling:
        table.add_section()
        for name, size in program.sampling.items():
            table.add_row(name, _size(size))
        table.add_row("total while sampling, before the step", _size(sum(program.sampling.values())))
        table.add_section()
    table.add_row("memory of the device", _size(program.limit))
    return table


def _collectives_table(program: CompiledStep) -> Table:
    table = Table(title="collectives per step", title_justify="left", title_style="bold")
    for name, justify in (
        ("kind", "left"), ("in loops of", "left"), ("times", "right"), ("sent", "right"), ("meanwhile", "left")
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    rows = summarize(list(program.collectives), unknown=program.shape.microbatches)
    for row in rows[:_MAX_ROWS]:
        kind = row["kind"] + (" between slices" if row["crosses_slices"] else "")
        meanwhile = "computes" if row["overlaps"] else "waits"
        table.add_row(kind, row["loops"] or "-", str(row["times"]), _size(row["bytes"]), meanwhile)
    table.add_section()
    times, sent = sum(row["times"] for row in rows), sum(row["bytes"] for row in rows)
    table.add_row("total sent by each device", "", str(times), _size(sent))
    return table


def _reduction(program: CompiledStep) -> str:
    model = program.config.model
    text = f"for every microbatch the devices sum {_size(program.gradient_bytes)} of gradients of the layers' matrices"
    if model.dtype != "bfloat16":
        return text
    other = (
        "config.model.reduce_dtype=bfloat16 halves them, and rounds the share of every device"
        if model.reduce_dtype == "float32"
        else "config.model.reduce_dtype=float32 doubles them, and rounds no share"
    )
    return f"{text} in {model.reduce_dtype}; {other}"


def _bounds_table(program: CompiledStep, topology: Topology, price: float | None) -> Table:
    bounds = find_bounds(program, topology)
    table = Table(title="bounds of a step", title_justify="left", title_style="bold", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("operations that the method needs", f"{program.flops:.4g}")
    table.add_row("seconds at peak rate, at least", f"{bounds.compute:.4g}")
    for name, value in (
        ("seconds for memory bandwidth, at least", bounds.memory),
        ("seconds for links of the slice, at least", bounds.network),
        ("of these, seconds without computation", bounds.exposed),
        ("seconds for the network between slices, at least", bounds.slices if topology.num_slices > 1 else None),
    ):
        if value is not None:
            table.add_row(name, f"{value:.4g}")
    table.add_row("tokens per second, at most", f"{program.tokens / bounds.seconds:,.0f}")
    table.add_row("MFU, at most", f"{bounds.compute / bounds.seconds:.2f}")
    if price is not None:
        cost = cost_per_million(bounds.seconds, program.tokens, topology.num_chips, price)
        table.add_row("cost per million tokens, at least", f"{cost:.4g}")
    return table


def _needs(program: CompiledStep) -> str:
    return f"{'at least ' if program.refusal else ''}{_size(program.total)}"


def _size(num_bytes: float) -> str:
    """Bytes in a readable unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"


# ------------------------------------------------------------------------------------------------ for programs


def as_dict(
    program: CompiledStep, topology: Topology, lengths: Lengths, price: float | None, rungs: Sequence[Rung]
) -> dict[str, Any]:
    """All figures of a plan: bytes, seconds and tokens."""
    bounds = find_bounds(program, topology)
    plan: dict[str, Any] = {
        "model": program.config.model.path,
        "topology": topology.name,
        "num_chips": topology.num_chips,
        "num_devices": len(topology.devices),
        "mesh": program.mesh,
        "assumed": dataclasses.asdict(lengths) | {"batch_size": program.config.batch_size},
        "batch": dataclasses.asdict(program.shape),
        **_figures(program),
        "limit_bytes": program.limit,
        "tokens": program.tokens,
        "flops": program.flops,
        "params": program.params,
        "active_params": program.active_params,
        "gradient_bytes_per_microbatch": program.gradient_bytes,
        "bound_seconds": dataclasses.asdict(bounds),
        "tokens_per_second_at_most": program.tokens / bounds.seconds,
        "collectives": summarize(list(program.collectives), unknown=program.shape.microbatches),
        "ladder": [
            {"setting": rung.setting, "why_not": rung.why_not} | (_figures(rung.program) if rung.program else {})
            for rung in rungs
        ],
    }
    if price is not None and not program.refusal:
        cost = cost_per_million(bounds.seconds, program.tokens, topology.num_chips, price)
        plan["cost_per_million_tokens_at_least"] = cost
    return plan


def _figures(program: CompiledStep) -> dict[str, Any]:
    return {
        "fits": program.fits,
        "refusal": program.refusal,
        "part_bytes": program.parts,
        "argument_bytes": program.arguments,
        "temporary_bytes": program.temporaries,
        "sampling_bytes": dict(program.sampling),
        "total_bytes": program.total,
        "compile_seconds": program.compile_seconds,
        "host_bytes": program.host_bytes,
    }
