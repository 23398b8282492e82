"""KTO's step with random weights on one device: its peak memory, its MFU, and the longest rows that fit.

    python -m benchmarks.device_step                                       # a toy, on any machine
    python -m benchmarks.device_step --architecture=configs/architectures/llama_3_2_1b --dtype=bfloat16
    python -m benchmarks.device_step --architecture=configs/architectures/gemma_3_1b --dtype=bfloat16 \
      --kept=bfloat16 --lengths 8192 --longest                             # 262,144 tokens of vocabulary

A row holds `--per-row` examples of one length without padding; half of each is completion. Each length runs in its own
process, so that running out of memory ends only that process, and a peak belongs to one length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.packing import Lengths, make_index
from kto_jax.config import Config, ModelConfig, OptimizerConfig, ReferenceConfig
from kto_jax.data.batches.packing import RowLimits
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.devices.chips import peak_flops
from kto_jax.devices.compilation import compile_lowered
from kto_jax.devices.sharding import place_batch, shardings
from kto_jax.models.quantised import cast_params
from kto_jax.models.weights.load import read_config
from kto_jax.objectives import make_objective
from kto_jax.planning.compile_step import Task
from kto_jax.training.initial_state import make_model
from kto_jax.training.state import create_state
from kto_jax.training.step import jit_train_step, make_recipe

ROOT = Path(__file__).parent.parent
_GIB = 2**30


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs steps of one length in this process: seconds of all but the first, tokens, FLOPs, and peak bytes."""
    length, batch_size = job["length"], job["batch"]
    kept = job["kept"]
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(dtype=job["dtype"], param_dtype=kept, remat=job["remat"]),
        reference=ReferenceConfig(param_dtype=kept),
        optimizer=OptimizerConfig(moments_dtype=kept, schedule="constant", warmup_steps=0),
        batch_size=batch_size,
        microbatch_rows=job["rows"],
        row_length=length,
    )
    architecture = read_config(Path(job["architecture"]))
    architecture = dataclasses.replace(architecture, max_length=max(length, architecture.max_length))
    objective = make_objective(config.objective, num_desirable=1, num_undesirable=1)
    device = jax.devices()[0]
    mesh, model = make_model(config, Task(architecture, objective), [device])
    recipe = make_recipe(config, objective, model, job["steps"])
    layout = shardings(mesh, model.logical_axes(kept), model.abstract_params(kept))
    draw = jax.jit(model.init_params, static_argnums=1, out_shardings=layout)
    policy = draw(jax.random.key(0), kept)
    state = create_state(policy, cast_params(policy, kept), recipe.optimizer, mesh, objective.initial_state)
    del policy
    schedule = _schedule(config, architecture.vocab_size, 1 + job["steps"], job["per_row"])
    step: Any = jit_train_step(recipe)
    program, seconds, figures, compile_seconds = None, [], {}, 0.0
    for number in range(1 + job["steps"]):
        batch = place_batch(mesh, schedule.batch(number))
        start = time.perf_counter()
        if program is None:
            program = compile_lowered(step.lower(state, batch), device.platform)
            start, compile_seconds = time.perf_counter(), time.perf_counter() - start
        state, figures = jax.block_until_ready(program(state, batch))
        seconds.append(time.perf_counter() - start)
    stated = (device.memory_stats() or {}).get("peak_bytes_in_use")
    peak, source = peak_flops(device, job["dtype"])
    return {
        "device": device.device_kind,
        "length": length,
        "seconds": seconds[1:],
        "compile_seconds": compile_seconds,
        "attention": model.layout.attention.name,
        "tokens": float(figures["tokens"]),
        "flops": float(figures["flops"]),
        "peak_flops": peak,
        "peak_source": source,
        # On CPU the peak of the whole process.
        "peak_bytes": stated or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": float(figures["loss"]),
    }


def _schedule(config: Config, vocab_size: int, steps: int, per_row: int) -> Schedule:
    """Steps of examples of which `per_row` fill a row."""
    length, count = int(config.row_length), config.batch_size * steps
    completion = np.full(count, length // per_row // 2)
    index = make_index(Lengths("filled rows", length // per_row - completion, completion, length, ()))
    tokens = np.random.default_rng(0).integers(3, vocab_size, len(index.tokens)).astype(np.int32)
    index = dataclasses.replace(index, tokens=tokens, weights=np.ones(count, np.float32))
    limits = RowLimits((length,), length // 2, int(config.microbatch_rows), max_length=length)
    return Schedule(index, np.arange(count), Order(config.batch_size, seed=0), limits)


def take(options: argparse.Namespace, length: int) -> dict[str, Any] | None:
    """The figures of one length, from a separate process; None if it ran out of memory.

    Raises:
      RuntimeError: the process failed for another reason.
    """
    job = {name: value for name, value in vars(options).items() if name not in ("lengths", "longest", "out", "job")}
    command = [sys.executable, "-m", "benchmarks.device_step", f"--job={json.dumps(job | {'length': length})}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "RESOURCE_EXHAUSTED" in done.stderr or done.returncode == -9:
        return None
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def find_longest(options: argparse.Namespace, length: int) -> dict[str, Any] | None:
    """The longest rows that fit, to a sixteenth: doubles the length, then bisects."""
    fits, too_long = take(options, length), None
    while fits and not (too_long and too_long - fits["length"] <= fits["length"] // 16):
        tried = (fits["length"] + too_long) // 2 if too_long else 2 * fits["length"]
        figures = take(options, tried)
        fits, too_long = (figures, too_long) if figures else (fits, tried)
    return fits


def show(results: list[dict[str, Any]]) -> Table:
    """The figures as text."""
    table = Table("tokens of a row", "s a step", "tokens/s", "MFU", "peak GiB", title=results[0]["device"])
    for one in results:
        seconds = statistics.median(one["seconds"])
        table.add_row(
            f"{one['length']:,}",
            f"{seconds:.3g}",
            f"{one['tokens'] / seconds:,.0f}",
            f"{one['flops'] / seconds / one['peak_flops']:.1%} of {one['peak_source']}",
            f"{one['peak_bytes'] / _GIB:.2f}",
        )
    return table


def main() -> None:
    """Measures the requested lengths, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="configs/tiny_model", help="a folder with a config.json")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--kept", choices=("float32", "bfloat16"), default="float32", help="weights and moments")
    parser.add_argument("--remat", choices=("none", "dots", "full", "offload"), default="full")
    parser.add_argument("--batch", type=int, default=2, help="examples a step")
    parser.add_argument("--rows", type=int, default=1, help="rows of a microbatch")
    parser.add_argument("--per-row", type=int, default=1, help="examples that fill a row")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256])
    parser.add_argument("--longest", action="store_true", help="also the longest rows that fit")
    parser.add_argument("--out", default="benchmarks/results/device_step.json")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(json.loads(options.job))))
        return
    results: list[dict[str, Any]] = []
    for length in options.lengths:
        if figures := take(options, length):
            results.append(figures)
            write(options, results)
        else:
            print(f"rows of {length:,} tokens do not fit")
    if not results:
        raise SystemExit(f"rows of {options.lengths} tokens do not fit. Take shorter ones.")
    if options.longest and (longest := find_longest(options, results[-1]["length"])):
        results.append(longest)
        write(options, results)
    Console().print(show(results))


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Writes the figures so far."""
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": vars(options), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
