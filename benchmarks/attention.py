"""Attention over packed rows: blockwise ("chunked") compared with all pairs of tokens ("dense"), by row length.

    python -m benchmarks.attention

Measures the forward pass, and forward plus backward pass, of one layer with SmolLM2-135M's heads in float32 over one
row of examples of log-normal length (median 250 tokens). Both alternate in one process; times are medians. Memory is
the compiler's figure for both passes beyond their arguments. Values and gradients are also compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kto_jax.models.attention.blockwise import blockwise_attention
from kto_jax.models.attention.dense import dense_attention

LENGTHS, MEMORY_LENGTHS = (160, 1024, 2304, 8192), (512, 1024, 2048, 4096, 8192, 16384)
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
MEDIAN, SIGMA = 250, 0.84  # 95 % are shorter than 1,000 tokens
ATTENTIONS: dict[str, Callable[..., jax.Array]] = {"dense": dense_attention, "chunked": blockwise_attention}


def pack(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [1, length] of a row that is filled with examples, the last truncated to fit."""
    random = np.random.default_rng(seed)
    segments, positions = np.zeros((2, 1, length), np.int32)
    start, number = 0, 0
    while start < length:
        size = min(max(8, round(random.lognormal(np.log(MEDIAN), SIGMA))), length - start)
        number += 1
        segments[0, start : start + size], positions[0, start : start + size] = number, np.arange(size)
        start += size
    return segments, positions


def passes(attend: Callable[..., jax.Array], segments: Any, positions: Any) -> dict[str, Callable[..., Any]]:
    """The forward pass, and both passes, as functions of queries, keys, values and the output's gradient."""
    attend = partial(attend, segment_ids_RL=segments, positions_RL=positions, precision=jax.lax.Precision.HIGHEST)

    def both(query: Any, key: Any, value: Any, gradient: Any) -> Any:
        mixed, pull_back = jax.vjp(attend, query, key, value)
        return mixed, *pull_back(gradient)

    return {"forward": lambda query, key, value, _: attend(query, key, value), "both": both}


def measure(length: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each attention and pass, and the largest difference between the two attentions."""
    random = np.random.default_rng(1)
    query, gradient = random.standard_normal((2, 1, length, HEADS, HEAD_DIM), np.float32)
    key, value = random.standard_normal((2, 1, length, KV_HEADS, HEAD_DIM), np.float32)
    arrays = [jnp.asarray(x) for x in (query, key, value, gradient)]
    programs = {
        (name, which): jax.jit(run)
        for name, attend in ATTENTIONS.items()
        for which, run in passes(attend, *pack(length)).items()
    }
    results = {of: jax.block_until_ready(program(*arrays)) for of, program in programs.items()}
    seconds: dict[Any, list[float]] = {of: [] for of in programs}
    for _ in range(repeats):
        for of, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[of].append(time.perf_counter() - start)
    pairs = zip(results["dense", "both"], results["chunked", "both"], strict=True)
    row: dict[str, Any] = {"length": length, "difference": max(float(jnp.abs(a - b).max()) for a, b in pairs)}
    for which in ("forward", "both"):
        row |= {f"{name}_{which}_ms": 1e3 * statistics.median(seconds[name, which]) for name in ATTENTIONS}
        row[f"{which}_ratio"] = row[f"dense_{which}_ms"] / row[f"chunked_{which}_ms"]
    return row


def memory(length: int, name: str) -> float:
    """MiB that both passes of an attention need beyond their arguments and results; compiles without running."""
    heads = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), np.float32)
    shared = jax.ShapeDtypeStruct((1, length, KV_HEADS, HEAD_DIM), np.float32)
    both = jax.jit(passes(ATTENTIONS[name], *pack(length))["both"])
    analysis: Any = both.lower(heads, shared, shared, heads).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def main() -> None:
    """Measures, prints, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="rows to time")
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=MEMORY_LENGTHS, help="rows to compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    times = [measure(length, options.repeats) for length in options.lengths]
    bytes_needed = [
        {"length": length} | {f"{name}_mib": memory(length, name) for name in ATTENTIONS}
        for length in options.memory_lengths
    ]
    for rows in filter(None, (times, bytes_needed)):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
        Console(width=160).print(table)
    if options.results:
        options.results.write_text(json.dumps({"times": times, "memory": bytes_needed}, indent=2) + "\n")


if __name__ == "__main__":
    main()
