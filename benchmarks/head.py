"""KTO through one output head, value and gradient: chunked log-probabilities compared with dense logits.

    python -m benchmarks.head                                    # a shape for a laptop
    python -m benchmarks.head --batch=32 --length=512 --width=1024 --vocabulary=128256 --dtype=bfloat16

Both alternate in one process; times are medians. Memory is what the compiled program needs beyond its arguments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from kto_jax.losses import kto_loss, token_logps


def dense_logps(hidden, head, targets):
    """Log-probabilities from an array of all logits, in float32."""
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def make_step(logps):
    """Loss and gradient with respect to hidden states and head; the reference has its own head."""

    def loss(policy, reference, targets, desirable):
        policy_logps = jnp.sum(logps(*policy, targets), axis=1)
        reference_logps = jax.lax.stop_gradient(jnp.sum(logps(*reference, targets), axis=1))
        return jnp.mean(kto_loss(policy_logps, reference_logps, desirable, jnp.zeros(())))

    return jax.jit(jax.value_and_grad(loss))


def main() -> None:
    """Prints the table and writes it to benchmarks/results/head.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"batch": 4, "length": 128, "width": 256, "vocabulary": 32000, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", default="benchmarks/results/head.json")
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (options.batch, options.length)

    def model(hidden_key, head_key):
        hidden = jax.random.normal(hidden_key, (*shape, options.width), options.dtype)
        return hidden, 0.02 * jax.random.normal(head_key, (options.width, options.vocabulary), options.dtype)

    targets = jax.random.randint(keys[4], shape, 0, options.vocabulary)
    arguments = (model(*keys[:2]), model(*keys[2:4]), targets, jnp.arange(options.batch) % 2 == 0)
    programs = {
        name: make_step(logps).lower(*arguments).compile()
        for name, logps in (("chunked", token_logps), ("dense", dense_logps))
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    values = {}
    for repeat in range(options.repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            values[name] = jax.block_until_ready(program(*arguments))
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    report(options, programs, seconds, values)


def report(options, programs, seconds, values) -> None:
    """Prints and writes the measurements."""
    table = Table("form", "ms, median", "MiB beyond the arguments", "loss")
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(options)}
    for name, program in programs.items():
        memory = program.memory_analysis()
        mebibytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
        milliseconds = 1e3 * statistics.median(seconds[name])
        table.add_row(name, f"{milliseconds:.1f}", f"{mebibytes:.0f}", f"{float(values[name][0]):.6f}")
        results[name] = {"milliseconds": milliseconds, "mebibytes": mebibytes, "loss": float(values[name][0])}
    Console().print(table)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
