"""Training tokens per second of a mixture of experts beside a dense model of the same active size, random weights.

    python -m benchmarks.experts
    python -m benchmarks.experts --experts=64 --per_token=8 --width=128 --rows=8

The dense model's feed-forward layer is as wide as a token's experts together, so both do the same products per token.
A measured call is the forward and backward pass of the sum of all tokens' log-probabilities. The models alternate, and
the median of the rounds counts. "ragged_dot" is the mixture with XLA's own grouped matmul.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kto_jax.models import grouped
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model


def configs(options: argparse.Namespace) -> dict[str, TransformerConfig]:
    """The dense model and the mixture."""
    heads = options.embed // 64
    shared: dict[str, Any] = {
        "vocab_size": options.vocab, "embed_dim": options.embed, "num_layers": options.layers, "num_heads": heads,
        "num_kv_heads": heads, "head_dim": 64, "tied_head": True,
    }  # fmt: skip
    experts = {"num_experts": options.experts, "experts_per_token": options.per_token, "shares_sum_to_one": True}
    return {
        "dense": TransformerConfig(**shared, mlp_dim=options.width * options.per_token),
        "mixture": TransformerConfig(**shared, mlp_dim=options.width, **experts),
    }


def make_call(config: TransformerConfig, options: argparse.Namespace) -> Callable[[], Any]:
    """A compiled forward and backward pass over packed rows."""
    model = Model.create(config, dtype=options.dtype)
    params = jax.jit(model.init_params, static_argnums=1)(jax.random.key(0), "float32")
    shape = (options.rows, options.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    segments, positions = np.ones(shape, np.int32), np.tile(np.arange(options.length), (options.rows, 1))

    def loss(params: Any) -> jax.Array:
        return -jnp.sum(model.token_logps(params, model.hidden_states(params, tokens, segments, positions), tokens))

    step = jax.jit(jax.grad(loss)).lower(params).compile()
    return lambda: jax.block_until_ready(step(params))


def by_instruction() -> Any:
    """A context in which products are compiled as XLA's grouped matmul."""
    return mock.patch.multiple(
        grouped, product_by_blocks=grouped.ragged_product, gradient_by_blocks=grouped.ragged_gradient
    )


def main() -> None:
    """Measures, and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("embed", 512), ("layers", 2), ("vocab", 1024), ("experts", 16), ("per_token", 4), ("width", 256), ("rows", 2),
        ("length", 256), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    calls = {name: make_call(config, options) for name, config in configs(options).items()}
    with by_instruction():
        calls["ragged_dot"] = make_call(configs(options)["mixture"], options)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    tokens = options.rows * options.length
    result = {name: round(tokens / statistics.median(times[1:]), 1) for name, times in seconds.items()}
    sizes = {name: config.num_active_params() for name, config in configs(options).items()}
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    print(json.dumps({"tokens_per_second": result, "active_params": sizes, "device": device, **vars(options)}))


if __name__ == "__main__":
    main()
