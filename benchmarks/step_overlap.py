"""Step time when metrics are read one step late, compared with reading them at once, alternating in one run.

    python -m benchmarks.step_overlap                                            # the tiny model
    python -m benchmarks.step_overlap --config=configs/quickstart.py --block=2 --rounds=4

Blocks of steps alternate: in one the host waits for every step before it dispatches the next, in the other it
dispatches first. Both log every step as training does, to metrics.jsonl and TensorBoard. Each block starts and ends
with no step in flight, so wall times divided by steps are comparable. "Dispatch" is the duration of the call that
dispatches a step: if it is close to the step time, the runtime itself blocks, and nothing can overlap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from kto_jax.command import read_command
from kto_jax.config import Config
from kto_jax.data.batches.prefetch import prefetch
from kto_jax.devices.compilation import Program
from kto_jax.devices.sharding import place_batch
from kto_jax.train import prepare
from kto_jax.training.in_flight import StepsInFlight
from kto_jax.training.initial_state import make_abstract_state, make_state
from kto_jax.training.logs import MetricsLog
from kto_jax.training.reference import choose_dtype
from kto_jax.training.step import jit_train_step, make_recipe
from kto_jax.training.trackers import open_trackers


def measure(config: Config, folder: Path, block: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, by block, read "at once" and "one step late"; and of the calls that dispatch them."""
    config = choose_dtype(config)
    inputs, mesh, model = prepare(config, folder / "run", folder)
    recipe = make_recipe(config, inputs.objective, model, inputs.num_steps)
    abstract = make_abstract_state(config, inputs, model, mesh, recipe.optimizer)
    state = make_state(config, inputs, model, recipe.optimizer, abstract)
    program = Program(jit_train_step(recipe))
    modes = {"at once": 0, "one step late": 1}
    num_steps = block * (1 + rounds * len(modes))
    batches = prefetch(lambda step: inputs.schedule.batch(step % inputs.num_steps), range(num_steps),
                       finish=lambda batch: place_batch(mesh, batch))  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    dispatch: dict[str, list[float]] = {name: [] for name in modes}
    losses = []
    trackers = open_trackers(config, folder / "run", 0)
    with (
        MetricsLog(folder / "run", 0, num_steps, trackers=trackers) as log,
        StepsInFlight(1e12, peak_is_measured=False) as in_flight,
    ):
        arriving = enumerate(in_flight.arriving(batches), start=1)

        def take(ahead: int) -> tuple[float, list[float]]:
            nonlocal state
            started, calls = time.perf_counter(), []
            for number in range(block):
                step, batch = next(arriving)
                since = time.perf_counter()
                state = in_flight.dispatch(step, program, state, batch)
                calls.append(time.perf_counter() - since)
                while len(in_flight) > (ahead if number < block - 1 else 0):
                    row = in_flight.read()
                    log.write(*row)
                    losses.append(row[1]["loss"])
            return (time.perf_counter() - started) / block, calls

        take(0)  # compiles
        for turn in range(rounds):
            for name in sorted(modes, reverse=turn % 2 == 1):
                mean, calls = take(modes[name])
                seconds[name].append(mean)
                dispatch[name] += calls
        batches.close()
    return {"device": jax.devices()[0].device_kind, "seconds": seconds, "dispatch": dispatch, "losses": losses}


def main() -> None:
    """Prints the table and writes the figures; any --config.FIELD=VALUE is passed on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each kind")
    parser.add_argument("--out", default="", help="a JSON file for the figures")
    options, fields = parser.parse_known_args()
    config, _ = read_command([f"--config={options.config}", "--config.max_steps=0", *fields])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run").mkdir()
        figures = measure(config, Path(folder), options.block, options.rounds)
    medians = {name: statistics.median(values) for name, values in figures["seconds"].items()}
    table = Table("figures read", "s a step", "dispatch, s", "blocks", title=f"{options.config}, {figures['device']}")
    for name, values in figures["seconds"].items():
        call = statistics.median(figures["dispatch"][name])
        table.add_row(name, f"{medians[name]:.4f}", f"{call:.4f}", " ".join(f"{value:.4f}" for value in values))
    Console().print(table)
    print(f"one step late takes {medians['one step late'] / medians['at once']:.3f} of the time")
    if options.out:
        Path(options.out).write_text(json.dumps({"settings": vars(options), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
