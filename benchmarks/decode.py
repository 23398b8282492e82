"""Decoding with random weights, tokens per second: our `sample` beside transformers' `generate`, by batch size.

    python -m benchmarks.decode                                            # a toy, on any machine
    python -m benchmarks.decode --architecture=configs/architectures/llama_3_2_1b --dtype=bfloat16

Both complete random prompts of one length greedily, and no completion ends early. They alternate: in each round each
runs in a process of its own, with a warm-up call before the timed ones of each batch size. A call is timed from lists
of ids to lists of ids. The weights are random, and not the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
CONTENDERS = ("kto_jax", "transformers")


def make_ours(options: argparse.Namespace) -> tuple[Callable[[list[list[int]]], Any], str]:
    """A call of our sampler, and the device."""
    import jax

    from kto_jax.devices.inference import place_model
    from kto_jax.models.weights.load import read_config
    from kto_jax.sampling.sample import Sampling, sample

    model = place_model(read_config(Path(options.architecture)), dtype=options.dtype).model
    params = jax.jit(model.init_params, static_argnums=1)(jax.random.key(0), options.dtype)
    sampling = Sampling(temperature=0.0, max_new_tokens=options.new_tokens)

    def call(prompts: list[list[int]]) -> Any:
        # No id ends a completion: this one is not in the vocabulary.
        never = model.config.vocab_size
        return sample(model, params, prompts, sampling, eos_id=never, key=jax.random.key(1), batch_size=len(prompts))

    return call, jax.devices()[0].device_kind


def make_transformers(options: argparse.Namespace) -> tuple[Callable[[list[list[int]]], Any], str]:
    """A call of transformers' generate, and the device."""
    import torch
    import transformers

    from kto_jax.models.families.config_json import write_config_json
    from kto_jax.models.weights.load import read_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The folders of configs/architectures name no model_type.
    values = write_config_json(read_config(Path(options.architecture)))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    count = options.new_tokens
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}

    def call(prompts: list[list[int]]) -> Any:
        ids = torch.tensor(prompts, device=device)
        with torch.no_grad():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return written[:, ids.shape[1] :].tolist()

    return call, torch.cuda.get_device_name() if device == "cuda" else device


def take_turn(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each timed call of one contender, by batch size."""
    call, device = {"kto_jax": make_ours, "transformers": make_transformers}[options.contender](options)
    seconds: dict[str, list[float]] = {}
    for size in options.batches:
        prompts = np.random.default_rng(size).integers(3, 200, (size, options.prompt)).tolist()
        seconds[str(size)] = []
        for repeat in range(options.repeats + 1):
            start = time.perf_counter()
            completions = call(prompts)
            if repeat:  # the first compiles
                seconds[str(size)].append(time.perf_counter() - start)
            assert [len(ids) for ids in completions] == [options.new_tokens] * size, "a completion ended early"
    return {"device": device, "seconds": seconds}


def summarise(results: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second of each contender by batch size, medians over all rounds, and ours by theirs."""
    summary: dict[str, dict[str, float]] = {}
    for size in map(str, options.batches):
        rates = {
            name: int(size) * options.new_tokens / statistics.median(s for turn in turns for s in turn["seconds"][size])
            for name, turns in results["turns"].items()
            if turns
        }
        if len(rates) == len(CONTENDERS):
            rates["ratio"] = rates["kto_jax"] / rates["transformers"]
        summary[size] = rates
    return summary


def main() -> None:
    """Runs all turns, and writes the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="configs/tiny_model", help="a folder with a config.json")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each completion")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of a batch size in a turn")
    parser.add_argument("--out", default="benchmarks/results/decode.json")
    parser.add_argument("--contender", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(take_turn(options)))
        return
    results: dict[str, Any] = {"settings": vars(options), "turns": {name: [] for name in CONTENDERS}}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], f"--contender={name}"]
            environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results["turns"][name].append(json.loads(done.stdout.splitlines()[-1]))
            results["summary"] = summarise(results, options)
            Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    for size, rates in results["summary"].items():
        print(f"batch {size}: " + ", ".join(f"{name} {rate:,.4g}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
