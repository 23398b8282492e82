"""The quickstart with all weights, LoRA, DoRA and QLoRA: peak memory, tokens per second, and what the judge says.

    python -m benchmarks.adapters --folder=runs/adapters
    python -m benchmarks.adapters --folder=runs/adapters --steps=16 --learning_rate=2e-5 --seeds=1

Runs take place one after the other, each in a process of its own, seed by seed, and those whose verdicts are in the
folder already are not repeated. The judge is the quickstart's: it is fitted on feedback that no run trains on. The
interval of a method is the mean over its seeds of the change in the share judged desirable, plus and minus the mean
half-width of the runs' own intervals over prompts; the seeds themselves are listed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ADAPTERS = ("--config.lora.rank=16",)
METHODS: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "LoRA": ADAPTERS,
    "DoRA": (*ADAPTERS, "--config.lora.dora=True"),
    "QLoRA (nf4)": (*ADAPTERS, "--config.reference.param_dtype=nf4"),
}
RATE_OF_ADAPTERS = 10
"""Their learning rate, relative to that of all weights."""


def train(folder: Path, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains once, unless that was done, and returns the figures of the run."""
    run = folder / f"{method.split()[0].lower()}-{seed}"
    figures = run.with_suffix(".json")
    if not figures.is_file():
        rate = options.learning_rate * (RATE_OF_ADAPTERS if METHODS[method] else 1)
        command = [
            sys.executable, "-m", "kto_jax.train", "--config=configs/quickstart.py", f"--workdir={run}",
            f"--config.seed={seed}", f"--config.max_steps={options.steps}",
            f"--config.optimizer.learning_rate={rate}", "--config.optimizer.warmup_steps=1",
            f"--config.samples.num_prompts={options.prompts}", f"--config.samples.max_new_tokens={options.tokens}",
            f"--config.checkpoint.every={options.steps}", f"--config.evaluation.max_examples={options.prompts}",
            *METHODS[method],
        ]  # fmt: skip
        with run.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}; see {log.name}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(row["seconds"] for row in rows[1:])
        judged = next(
            row for row in json.loads((run / "verdicts.json").read_text()) if row["figure"].startswith("judged")
        )
        found = {
            "peak_bytes": usage.ru_maxrss * 1024,
            "tokens_per_second": sum(row["tokens"] for row in rows[1:]) / seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            **{name: judged[name] for name in ("before", "after", "low", "high")},
        }
        figures.write_text(json.dumps(found))
    return json.loads(figures.read_text())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, by their names")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="fewer than the quickstart's 16, at a higher rate")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="of all weights")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=40, help="the longest completion")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for method in options.methods.split(","):
            found.setdefault(method, []).append(train(options.folder, method, seed, options))
    title = f"{options.steps} steps, {options.seeds} seeds, {options.prompts} prompts"
    table = Table("trained", "peak memory", "tokens/s", "judged desirable, before", "change", "by seed", title=title)
    for method, runs in found.items():
        changes = [run["after"] - run["before"] for run in runs]
        half = statistics.mean((run["high"] - run["low"]) / 2 for run in runs)
        table.add_row(
            method,
            f"{statistics.median(run['peak_bytes'] for run in runs) / 2**30:.2f} GiB",
            f"{statistics.median(run['tokens_per_second'] for run in runs):.1f}",
            f"{statistics.mean(run['before'] for run in runs):.0%}",
            f"{statistics.mean(changes):+.0%} ± {half:.0%}",
            ", ".join(f"{change:+.0%}" for change in changes),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
