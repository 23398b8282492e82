"""What XLA's options change in the compiled training step: memory, communication, and the part that nothing hides.

    python -m benchmarks.compiler_options --topology=v5e:4x4                        # every option alone, beside none
    python -m benchmarks.compiler_options --topology=v5p:4x4x4 --model=llama_3_1_8b --sets none
    python -m benchmarks.compiler_options --topology=8*h100                          # needs jax-cuda13-plugin

Nothing runs: TPUs and GPUs are described to the compiler. A collective is exposed if the schedule computes nothing
while it runs. "run" is what a run sets (`compilation.COMPILER_OPTIONS`), "none" what the compiler does without.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from kto_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ReferenceConfig
from kto_jax.devices.compilation import COMPILER_OPTIONS
from kto_jax.planning.compile_step import CompiledStep, Lengths, compile_step, read_task
from kto_jax.planning.hlo import summarize
from kto_jax.planning.report import find_bounds
from kto_jax.planning.topology import Topology, open_topology

ROOT = Path(__file__).parent.parent
GIB = 2**30
TRIED: dict[str, tuple[dict[str, bool | int], ...]] = {
    "tpu": (
        {"xla_tpu_enable_async_collective_fusion": True},
        {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True},
        {"xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True},
        {"xla_tpu_enable_async_collective_fusion_multiple_steps": True},
        {"xla_tpu_overlap_compute_collective_tc": True},
        {"xla_enable_async_all_gather": True},
        {"xla_tpu_enable_data_parallel_all_reduce_opt": True},
        {"xla_tpu_data_parallel_opt_different_sized_ops": True},
        {"xla_enable_async_all_reduce": True},
        {"xla_tpu_enable_latency_hiding_scheduler": True},
        {"xla_tpu_enable_all_experimental_scheduler_features": True},
        {"xla_tpu_prefer_async_allgather_to_allreduce": True},
    ),
    "gpu": (
        {"xla_gpu_enable_latency_hiding_scheduler": True},
        {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_pipelined_all_gather": True},
        {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_pipelined_all_reduce": True},
        {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_while_loop_double_buffering": True},
        {"xla_gpu_all_reduce_combine_threshold_bytes": 2**28},
        {"xla_gpu_all_gather_combine_threshold_bytes": 2**28},
        {"xla_gpu_reduce_scatter_combine_threshold_bytes": 2**28},
    ),
}


def open_devices(name: str) -> Topology:
    """The topology of a name: those of `kto_jax.plan`, or 8*h100 for eight GPUs of one machine."""
    if not name.endswith(("h100", "h200")):
        return open_topology(name)
    from benchmarks import gpu_compile

    count, _, card = name.rpartition("*")
    return gpu_compile.open_card(card, int(count or 1))


def as_default(topology: Topology) -> contextlib.AbstractContextManager[None]:
    """Makes a described GPU the default device, which tokamax asks about."""
    if topology.devices[0].platform != "gpu":
        return contextlib.nullcontext()
    from benchmarks import gpu_compile

    return gpu_compile.as_default_device(topology.devices[0])


def make_config(options: argparse.Namespace, topology: Topology) -> Config:
    """The run whose step is compiled: bfloat16, FSDP over all devices, one microbatch of a row for each."""
    chips = len(topology.devices)
    return dataclasses.replace(
        Config(),
        model=ModelConfig(path=str(ROOT / "configs" / "architectures" / options.model), dtype="bfloat16"),
        reference=ReferenceConfig(param_dtype="bfloat16"),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
        mesh=MeshConfig(data=1, fsdp=chips // options.tensor, tensor=options.tensor),
        data=dataclasses.replace(Config().data, max_length=2048),
        batch_size=2 * chips * options.microbatches,
        microbatch_rows=chips,
    )


def figures(program: CompiledStep, topology: Topology) -> dict[str, Any]:
    """Memory, bytes sent and exposed of each device, and the seconds that the links need for them."""
    if program.refusal:
        return {"refusal": program.refusal[:200], "gib": program.total / GIB}
    bounds = find_bounds(program, topology)
    rows = summarize(list(program.collectives), unknown=program.shape.microbatches)
    return {
        "gib": program.total / GIB,
        "sent_gib": sum(row["bytes"] for row in rows) / GIB,
        "exposed_gib": sum(row["bytes"] for row in rows if not row["overlaps"]) / GIB,
        "seconds_of_links": bounds.network,
        "exposed_seconds": bounds.exposed,
        "seconds_of_products": bounds.compute,
        "by_kind": {
            kind: sum(row["bytes"] for row in rows if row["kind"] == kind) / GIB
            for kind in sorted({row["kind"] for row in rows})
        },
        "compile_seconds": program.compile_seconds,
    }


def main() -> None:
    """Compiles the step with each set of options; prints the table, and adds it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--model", default="llama_3_2_1b", help="a folder of configs/architectures")
    parser.add_argument("--layers", type=int, default=0, help="of the model, fewer than it has; 0 for all")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--sets", nargs="*", default=[], help="none, run, NAME=VALUE,NAME=VALUE; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compiler_options.json")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology = open_devices(options.topology)
    platform = topology.devices[0].platform
    named: dict[str, dict[str, Any]] = {"none": {}, "run": COMPILER_OPTIONS.get(platform, {})}
    named |= {",".join(f"{key}={value}" for key, value in each.items()): each for each in TRIED[platform]}
    for text in options.sets:
        if text not in named:
            named[text] = {key: _value(value) for key, _, value in (part.partition("=") for part in text.split(","))}
    config = make_config(options, topology)
    task = read_task(config)
    if options.layers:
        task = dataclasses.replace(task, architecture=dataclasses.replace(task.architecture, num_layers=options.layers))
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    settings = {name: getattr(options, name) for name in ("layers", "tensor", "microbatches")}
    run = " ".join([options.model, options.topology, *(f"{name}={value}" for name, value in settings.items())])
    found = kept.setdefault(run, {"jax": jax.__version__, "sets": {}})["sets"]
    table = Table("options", "GiB", "GiB sent", "exposed", "s of links", "exposed", "compile, s", title=run)
    for name in options.sets or named:
        try:
            with as_default(topology):
                program = compile_step(config, task, topology, Lengths(1024, 512), named[name])
            row = figures(program, topology)
        except jax.errors.JaxRuntimeError as error:  # The compiler does not know the option.
            row = {"refusal": str(error).splitlines()[0][:200]}
        found[name] = row
        print(name, json.dumps(row), flush=True)
        keys = ("gib", "sent_gib", "exposed_gib", "seconds_of_links", "exposed_seconds", "compile_seconds")
        table.add_row(name, *(f"{row[key]:.3f}" if row.get(key) is not None else "-" for key in keys))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    Console(width=200).print(table)


def _value(text: str) -> bool | int:
    return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int(text)


if __name__ == "__main__":
    main()
