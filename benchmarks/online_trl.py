"""GRPO online compared with TRL's GRPOTrainer: completions per second of whole rounds, and the curves of the reward.

    python -m benchmarks.online_trl                                   # SmolLM2-135M, the online quickstart's model
    python -m benchmarks.online_trl --peer-python=env/bin/python      # an environment that has torch and TRL 1.16

Both sample `--num-samples` completions for the same prompts in the same order at temperature 1, of up to
`--max-new-tokens` tokens, reward those of at most 15 words with the same function, and take one step of AdamW on the
loss of Dr. GRPO in each round, in float32, without a KL term. They alternate, each in a new process. TRL samples all
completions of a round at once with transformers' generate, and trains without activation checkpointing, for speed.

A round's seconds include everything between the prompts and the next policy: sampling, reward, update, and of kto_jax
also the files that it leaves, with a checkpoint after every `--save-every` rounds. Rounds before `--warmup` are not
timed: kto_jax compiles in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from rich.console import Console
from rich.table import Table

from benchmarks.generation import SMOLLM2, export_for_peers, run_benchmark
from benchmarks.kto import ROOT, Contender, make_environment
from configs import online_quickstart
from kto_jax.config import resolve
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.tokenizer import encode_prompts
from kto_jax.rollouts.prompts import prompts_of_round, read_prompts
from kto_jax.storage.folders import cache_directory

PEER = Contender("trl_grpo", requirements=("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0"))
CONTENDERS = ("kto_jax", "trl")
console = Console()


def main() -> None:
    """Runs both contenders, prints a table, and writes benchmarks/results/online_trl.json."""
    run_benchmark(read_options(), measure, make_table)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--turns", type=int, default=1, help="how often each contender runs")
    parser.add_argument("--rounds", type=int, default=6, help="of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not timed")
    parser.add_argument("--prompts", type=int, default=4, help="of a round")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--microbatch", type=int, default=16, help="completions that TRL trains on at once")
    parser.add_argument("--save-every", type=int, default=6, help="rounds of kto_jax; TRL saves in none of these")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default=SMOLLM2, help="a path, wheel: or Hub id")
    parser.add_argument("--dtype", choices=("float32",), default="float32")
    parser.add_argument("--peer-python", default="", help="an environment for TRL; made if empty")
    parser.add_argument("--out", default="benchmarks/results/online_trl.json")
    return parser.parse_args()


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """All turns.

    Yields:
      After each turn of both: the settings, each turn's seconds, rewards and mean lengths by round with the load of the
      machine at its start; and the ratio of kto_jax's completions per second to TRL's, by turn.
    """
    config = make_config(options, export_for_peers(options.model, options.dtype))
    job = make_job(options, config, scratch)
    shown = ("completions", "num_samples", "max_new_tokens", "save_every", "learning_rate", "dtype", "threads")
    settings = {name: job[name] for name in shown} | {
        "microbatch": options.microbatch, "model": Path(options.model).name, "warmup": options.warmup
    }  # fmt: skip
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(options.turns):
        # Neither is always the first.
        for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
            console.print(f"turn {number + 1} of {options.turns}: {name}")
            load = os.getloadavg()[0]
            turn = (
                run_ours(config, job, scratch / f"run{number}") if name == "kto_jax" else run_trl(job, options, scratch)
            )
            turns[name].append({"load": load, **turn})
        rates = {
            name: [job["completions"] / statistics.median(turn["seconds"][options.warmup :]) for turn in taken]
            for name, taken in turns.items()
        }
        ratios = [ours / other for ours, other in zip(rates["kto_jax"], rates["trl"], strict=True)]
        yield {"settings": settings, "turns": turns, "completions_per_second": rates, "ratios": ratios}


def make_config(options: argparse.Namespace, model: Path) -> ml_collections.ConfigDict:
    """The online quickstart, with GRPO and one update in a round."""
    config = online_quickstart.get_config()
    config.model.path = str(model)
    config.data.holdout = 0.0
    config.objective.name, config.objective.variant = "grpo", "dr_grpo"
    config.objective.length_scale = float(options.max_new_tokens)
    config.batch_size = options.prompts * options.num_samples
    config.optimizer.learning_rate, config.optimizer.warmup_steps = options.learning_rate, 0
    config.epochs = 1
    return config


def make_job(options: argparse.Namespace, config: ml_collections.ConfigDict, scratch: Path) -> dict[str, Any]:
    """TRL's job: the settings and, for each round, the token ids of its prompts."""
    resolved = resolve(config)
    rows, _ = read_prompts(resolved.data)
    tokenizer = prepare_tokenizer(
        Path(config.model.path), scratch / "tokenizer", chat_template=resolved.data.chat_template
    )
    rounds = [prompts_of_round(rows, number, options.prompts, resolved.seed) for number in range(options.rounds)]
    prompts = [[ids.tolist() for ids in encode_prompts(tokenizer, [row.prompt for row in own])] for own in rounds]
    optimizer = resolved.optimizer
    return {
        "model": config.model.path, "dtype": options.dtype, "threads": options.threads, "prompts": prompts,
        "completions": config.batch_size, "num_samples": options.num_samples, "max_new_tokens": options.max_new_tokens,
        "microbatch": options.microbatch, "learning_rate": optimizer.learning_rate, "b2": optimizer.b2,
        "weight_decay": optimizer.weight_decay, "clip_norm": optimizer.clip_norm, "seed": resolved.seed,
        "result": str(scratch / "result.json"), "save_every": options.save_every,
    }  # fmt: skip


def run_ours(config: ml_collections.ConfigDict, job: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Trains with kto_jax.online in its own process."""
    workdir.mkdir()
    recipe = workdir / "recipe.py"
    recipe.write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({config.to_dict()!r})\n"
    )
    flags = [
        f"--config={recipe}", f"--workdir={workdir / 'run'}", "--reward=benchmarks/peers/short_answer.py:short",
        f"--rounds={len(job['prompts'])}", f"--prompts_per_round={len(job['prompts'][0])}", "--held_out=0",
        f"--num_samples={job['num_samples']}", f"--max_new_tokens={job['max_new_tokens']}", "--keep=1",
        f"--save_every={job['save_every']}",
        # Without a KL term TRL reads no reference either.
        "--reference=previous",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        # An index that an earlier turn made of the same completions would be found.
        "KTO_JAX_CACHE": str(workdir / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory() / "benchmarks" / "compiled"),
    }
    limit = "import os,sys;os.sched_setaffinity(0,sorted(os.sched_getaffinity(0))[:int(sys.argv[1])]);"
    start = f"{limit}os.execv(sys.executable,[sys.executable,'-m','kto_jax.online',*sys.argv[2:]])"
    command = [sys.executable, "-c", start, str(job["threads"]), *flags]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    log = [json.loads(line) for line in (workdir / "run" / "rounds.jsonl").read_text().splitlines()]
    parts = ("sampling_seconds", "training_seconds")
    return {
        "seconds": [row["seconds"] for row in log],
        "rewards": [row["reward"] for row in log],
        "lengths": [row["num_tokens"] for row in log],
        **{name: [row[name] for row in log] for name in parts},
    }


def run_trl(job: dict[str, Any], options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Trains with TRL in its own process."""
    path = scratch / "job.json"
    path.write_text(json.dumps(job))
    python = options.peer_python or make_environment(PEER)
    command = [str(python), "-W", "ignore", "-m", f"benchmarks.peers.{PEER.module}", str(path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    return json.loads(Path(job["result"]).read_text())


def make_table(results: dict[str, Any]) -> Table:
    """Medians as text, and the curves."""
    table = Table("contender", "completions/s", "kto_jax by it", "mean length", "reward by round")
    ours = results["completions_per_second"]["kto_jax"]
    for name, turns in results["turns"].items():
        rates = results["completions_per_second"][name]
        table.add_row(
            name,
            f"{statistics.median(rates):.3g}",
            f"{statistics.median(a / b for a, b in zip(ours, rates, strict=True)):.2f}×",
            f"{statistics.mean(length for turn in turns for length in turn['lengths']):.1f}",
            " ".join(f"{statistics.mean(values):.2f}" for values in zip(*(t["rewards"] for t in turns), strict=True)),
        )
    return table


if __name__ == "__main__":
    main()
