"""What rounding the quickstart's reference does: error of log-probabilities and rewards, memory, and speed of its pass.

    python -m benchmarks.rounded_reference
    python -m benchmarks.rounded_reference --batches=1 --rounds=1

All kinds compute in float32, so the difference is that of the weights. The kinds take turns over the same microbatches,
and the median of the rounds counts; a round of a kind is its forward pass, dequantisation included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.kto_sets import FeedbackSet, quickstart_set
from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.objectives import make_objective
from kto_jax.training.forward import LabelledRows, read_completions

KINDS = ("float32", "bfloat16", "int8", "nf4", "int4")


def read_microbatches(feedback: FeedbackSet, num_batches: int) -> list[LabelledRows]:
    """The matched rows of the first batches, microbatch by microbatch."""
    found = []
    for step in range(num_batches):
        batch = feedback.schedule.batch(step)
        rows = LabelledRows(batch.matched, batch.desirable, batch.scores, None, None)
        found += [jax.tree.map(lambda leaf, place=place: leaf[place], rows) for place in range(int(batch.num_matched))]
    return found


def measure(num_batches: int, rounds: int) -> dict[str, Any]:
    """Log-probabilities of the completions by kind, and the seconds of every round."""
    feedback = quickstart_set("")
    config = feedback.config
    files = find_model(config.model.path)
    model = Model.create(read_config(files.weights), dtype="float32")
    objective = dataclasses.replace(
        make_objective(config.objective, num_desirable=1, num_undesirable=1), uses_reference=False
    )
    microbatches = read_microbatches(feedback, num_batches)
    read = jax.jit(lambda params, rows: read_completions(model, objective, params, None, rows).likelihood)
    params = {kind: load_params(model, files, param_dtype=kind) for kind in KINDS}
    filled = np.concatenate([rows.rows.filled.reshape(-1) for rows in microbatches])
    logps = {}
    for kind in KINDS:  # compiles
        found = [np.asarray(read(params[kind], rows)).reshape(-1) for rows in microbatches]
        logps[kind] = np.concatenate(found)[filled]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
            started = time.perf_counter()
            for rows in microbatches[:4]:
                jax.block_until_ready(read(params[kind], rows))
            seconds[kind].append(time.perf_counter() - started)
    size = {kind: sum(leaf.nbytes for leaf in jax.tree.leaves(params[kind])) for kind in KINDS}
    return {"completions": int(filled.sum()), "beta": 0.1, "logps": logps, "seconds": seconds, "bytes": size}


def summarise(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By kind: megabytes, errors in nats, and the time of a pass relative to float32's."""
    base = statistics.median(result["seconds"]["float32"])
    rows = {}
    for kind in KINDS:
        error = np.abs(result["logps"][kind] - result["logps"]["float32"])
        rows[kind] = {
            "megabytes": result["bytes"][kind] / 1e6,
            "logp_mean": float(error.mean()),
            "logp_max": float(error.max()),
            "reward_mean": float(error.mean()) * result["beta"],
            "reward_max": float(error.max()) * result["beta"],
            "time": statistics.median(result["seconds"][kind]) / base,
        }
    return rows


def main() -> None:
    """Prints the table, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="batches of 16 completions")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = measure(options.batches, options.rounds)
    rows = summarise(result)
    table = Table("reference.param_dtype", *next(iter(rows.values())), title=f"{result['completions']} completions")
    for kind, row in rows.items():
        table.add_row(kind, *(f"{value:.3g}" for value in row.values()))
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
