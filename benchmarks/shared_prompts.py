"""What sharing each prompt between a KTO step's two passes of the reference would save: tokens read, and seconds.

    python -m benchmarks.shared_prompts                                                # SmolLM2-135M's shape
    python -m benchmarks.shared_prompts --architecture=configs/tiny_model --rows=2 --repeats=1

A step reads each prompt four times: the policy with the completion (forward and backward) and with an unmatched one,
and the reference with both. The reference could read prompt, completion and unmatched completion in one row. The parts
are timed one after another on rows of one example, with random weights, medians of alternating repeats. A row of all
three is timed as one segment, which does the same products and no less attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.models.weights.load import read_config

RATIOS = {"1/4": 0.25, "1": 1.0, "4": 4.0}
SMOLLM2 = TransformerConfig(
    vocab_size=49152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
    tied_head=True,
)  # fmt: skip


def make_rows(model: Model, rows: int, prompt: int, completion: int) -> tuple[np.ndarray, ...]:
    """Tokens, segments and positions of rows of one example, and the places whose hidden states predict."""
    length = prompt + completion
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return tokens, np.ones_like(tokens), positions, np.arange(prompt - 1, length - 1)


def make_passes(model: Model) -> tuple[Any, Any]:
    """A forward pass, and a forward and backward pass: sums of log-probabilities of the completions."""

    def total(params: Any, tokens: Any, segments: Any, positions: Any, predictors: Any) -> jax.Array:
        hidden = model.hidden_states(params, tokens, segments, positions)[:, predictors]
        return jnp.sum(model.token_logps(params, hidden, jnp.take(tokens, predictors + 1, axis=1)))

    return jax.jit(total), jax.jit(jax.grad(total))


def measure(model: Model, options: argparse.Namespace, ratio: float) -> dict[str, float]:
    """Tokens that a step reads, and its seconds, without and with a shared prompt."""
    prompt = round(options.length * ratio / (1 + ratio))
    completion = options.length - prompt
    forward, both = make_passes(model)
    apart = make_rows(model, options.rows, prompt, completion)
    joint = make_rows(model, options.rows, prompt, 2 * completion)
    params = jax.jit(model.init_params, static_argnums=1)(jax.random.key(0), options.dtype)
    calls = {"forward": (forward, apart), "both": (both, apart), "joint": (forward, joint)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + 1):
        for name, (call, rows) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(params, *rows))
            if repeat:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "prompt": prompt,
        "completion": completion,
        "tokens_apart": 4 * options.rows * options.length,
        "tokens_shared": options.rows * (3 * options.length + completion),
        "seconds_apart": median["both"] + 3 * median["forward"],
        "seconds_shared": median["both"] + median["forward"] + median["joint"],
        "reference_apart": 2 * median["forward"],
        "reference_shared": median["joint"],
    }


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="", help="a folder with config.json; default: SmolLM2-135M's shape")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of prompt and completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shared_prompts.json"))
    options = parser.parse_args()
    config = read_config(Path(options.architecture)) if options.architecture else SMOLLM2
    model = Model.create(config, dtype=options.dtype, remat="dots")
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": options.rows}
    table = Table("prompt / completion", "tokens read", "shared", "seconds a step", "shared", "saved")
    for name, ratio in RATIOS.items():
        row = measure(model, options, ratio)
        results[name] = row
        saved = 1 - row["seconds_shared"] / row["seconds_apart"]
        table.add_row(
            name, f"{row['tokens_apart']:,}", f"{row['tokens_shared']:,}", f"{row['seconds_apart']:.2f}",
            f"{row['seconds_shared']:.2f}", f"{saved:.1%}",
        )  # fmt: skip
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
