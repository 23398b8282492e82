"""Online KTO, online DPO, GRPO and PPO on SmolLM2: the share of answers that keep a checker's rule, before and after.

    python -m benchmarks.online_methods --folder=runs/online_methods
    python -m benchmarks.online_methods --folder=runs/online_methods --methods="online KTO;PPO" --seeds=1

Every method samples the same number of completions of the online quickstart's prompts, with the reward max_words(15).
Runs take place one after the other, each in a process of its own, seed by seed, and those whose figures are in the
folder already are not repeated. The held-out prompts are completed before the first and after the last round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REWARD = "max_words(15)"
TOKEN_RATE = "--config.optimizer.learning_rate=2e-5"
METHODS: dict[str, tuple[str, ...]] = {
    "online KTO": ("--config.objective.name=kto",),
    "online DPO": ("--config.objective.name=dpo", "--config.batch_size=4"),
    "GRPO": ("--config.objective.name=grpo", "--config.objective.kl_weight=0.01", TOKEN_RATE),
    "PPO": ("--config.objective.name=ppo", "--config.optimizer.value_clip_norm=1", TOKEN_RATE),
    "PPO, value model": (
        *("--config.objective.name=ppo", "--config.optimizer.value_clip_norm=1", TOKEN_RATE),
        "--config.objective.value_tower=True",
    ),
}
"""The settings in which they differ. A batch of DPO holds 4 pairs, so that all make as many updates."""


def train(folder: Path, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains once, unless that was done, and returns the figures of the run."""
    run = folder / f"{method.lower().replace(', ', '_').replace(' ', '_')}-{seed}"
    figures = run.with_suffix(".json")
    if not figures.is_file():
        command = [
            sys.executable, "-m", "kto_jax.online", "--config=configs/online_quickstart.py", f"--reward={REWARD}",
            f"--workdir={run}", f"--config.seed={seed}", f"--rounds={options.rounds}",
            f"--prompts_per_round={options.prompts}", f"--num_samples={options.num_samples}",
            f"--max_new_tokens={options.tokens}", "--keep=1", *METHODS[method],
        ]  # fmt: skip
        start = time.monotonic()
        with run.with_suffix(".log").open("w") as log:
            status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}; see {log.name}")
        figures.write_text(json.dumps(read_figures(run) | {"seconds": time.monotonic() - start}))
    return json.loads(figures.read_text())


def read_figures(run: Path) -> dict[str, Any]:
    """Figures of a finished run: held-out prompts before and after, its rounds, and z0 of every step."""
    held_out = json.loads((run / "held_out.json").read_text())
    rounds = list(read_rows(run / "rounds.jsonl"))
    steps = [row for number in range(len(rounds)) for row in read_rows(run / f"round_{number:03}/run/metrics.jsonl")]
    return {
        **held_out,
        "rewards": [row["reward"] for row in rounds],
        "kl": [row["kl_completion"] for row in rounds],
        "completions": sum(row["completions"] for row in rounds),
        "sampling_share": statistics.mean(row["sampling_share"] for row in rounds),
        "z0": [row["z0"] for row in steps if "z0" in row],
        "explained_variance": [row["explained_variance"] for row in rounds if "explained_variance" in row],
        "updates": len(steps),
    }


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    yield from map(json.loads, path.read_text().splitlines())


def make_table(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> Table:
    """One row for each run."""
    completions = options.rounds * options.prompts * options.num_samples
    title = f"{REWARD}, {completions} completions in {options.rounds} rounds"
    table = Table(
        "method", "seed", "kept the rule, before → after", "mean tokens", "KL, nats a completion", "largest z0",
        "updates", "minutes", "of them sampling", title=title,
    )  # fmt: skip
    for method, runs in found.items():
        for seed, run in enumerate(runs):
            before, after = run["before"], run["after"]
            table.add_row(
                method,
                str(seed),
                f"{before['reward']:.0%} → {after['reward']:.0%} ± {1.96 * after['reward_error']:.0%}",
                f"{before['num_tokens']:.0f} → {after['num_tokens']:.0f}",
                f"{run['kl'][-1]:.2f}",
                f"{max(run['z0']):.2f}" if run["z0"] else "",
                str(run["updates"]),
                f"{run['seconds'] / 60:.1f}",
                f"{run['sampling_share']:.0%}",
            )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--methods", default=";".join(METHODS), help="which, by their names, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16, help="of a round")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="the longest completion")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for method in options.methods.split(";"):
            found.setdefault(method, []).append(train(options.folder, method, seed, options))
    Console(width=160).print(make_table(found, options))


if __name__ == "__main__":
    main()
