"""Gain of loader processes: batches per second from a thread, and from one and two processes.

    python -m benchmarks.loaders

Lengths are log-normal (median 250, 95th percentile 1,000, cap 2,048), batches of 256 examples, matched and unmatched
rows. "Unhurried" consumes batches as fast as they come. The other steps simulate a device that computes independently
(the step sleeps), and one that uses this process's cores (the step multiplies matrices, as JAX does on CPU). The first
batches, while processes start, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.packing import log_normal_lengths, make_index
from kto_jax.data.batches.packing import RowLimits
from kto_jax.data.batches.prefetch import prefetch
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.index.builder import COLUMNS, FORMAT
from kto_jax.data.index.index import Index, open_index

_WARM_UP = 8


def written(index: Index, directory: Path) -> Index:
    """The index on disk, where loaders find it."""
    index.tokens.tofile(directory / "tokens.bin")
    for name in COLUMNS:
        np.save(directory / f"{name}.npy", getattr(index, name))
    (directory / "manifest.json").write_text(json.dumps({**index.manifest, "format": FORMAT}))
    return open_index(directory)


def measure(schedule: Schedule, num_loaders: int, step: Callable[[], object], num_steps: int) -> dict[str, float]:
    """Steps per second, and the milliseconds that a step waited for its batch."""
    batches = prefetch(schedule.batch, range(num_steps + _WARM_UP), num_loaders=num_loaders)
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in range(_WARM_UP - 1):
        next(batches)
        step()
    waited, started = 0.0, time.perf_counter()
    for _ in range(num_steps):
        since = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - since
        step()
    seconds = time.perf_counter() - started
    batches.close()
    return {"steps_per_second": num_steps / seconds, "wait_ms": 1e3 * waited / num_steps, "first_seconds": first}


def main() -> None:
    """Prints the table and writes it to benchmarks/results/loaders.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--step_ms", type=float, default=20.0)
    parser.add_argument("--out", default="benchmarks/results/loaders.json")
    options = parser.parse_args()
    lengths = log_normal_lengths()
    matrix = np.ones((1536, 1536), np.float32)
    steps: dict[str, Callable[[], object]] = {
        "unhurried": lambda: None,
        f"sleeps {options.step_ms:g} ms": lambda: time.sleep(options.step_ms / 1e3),
        "multiplies matrices": lambda: matrix @ matrix,
    }
    table = Table("step", "loaders", "steps/s", "wait, ms", "first batch, s", title=f"{os.cpu_count()} cores")
    results = []
    with tempfile.TemporaryDirectory() as directory:
        index = written(make_index(lengths), Path(directory))
        limits = RowLimits((2048,), completion_length=2048, microbatch_rows=8, max_length=2048)
        order = Order(options.batch_size, seed=0, epochs=9)
        schedule = Schedule(index, np.arange(len(lengths.prompt)), order, limits)
        size = sum(array.nbytes for array in _arrays(schedule.batch(0)))
        for name, step in steps.items():
            for num_loaders in (0, 1, 2):
                figures = measure(schedule, num_loaders, step, options.steps)
                results.append({"step": name, "num_loaders": num_loaders, **figures})
                table.add_row(name, str(num_loaders or "thread"), *(f"{value:.1f}" for value in figures.values()))
    Console().print(table)
    print(f"a batch is {size / 1e6:.1f} MB")
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**vars(options), "batch_bytes": size, "results": results}, indent=2) + "\n")


def _arrays(batch: object) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


if __name__ == "__main__":
    main()
