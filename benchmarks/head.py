"""KTO through one output head, value and gradient: our log-probabilities, dense logits and tokamax's fused loss.

    python -m benchmarks.head                                    # a shape for a laptop
    python -m benchmarks.head --batch=32 --length=512 --width=1024 --vocabulary=128256 --dtype=bfloat16
    python -m benchmarks.head --batch=32 --length=512 --width=1024 --vocabulary=128256 --compile-for=v5e:1x1

Contenders:

    recomputed   `token_logps`, which computes the logits again in the backward pass
    kept         `token_logps`, which keeps the logits of the forward pass
    dense        plain JAX: all logits in float32
    tokamax …    tokamax's linear cross-entropy (extra [cuda]), each implementation that runs here

They alternate in one process; times are medians. Memory is what the compiled program needs beyond its arguments. The
error is the largest difference of the gradient from that of dense logits in float32, as a share of its largest value.
With --compile-for, a TPU topology of one chip, or h100 or h200, nothing runs: memory is the compiler's figure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from kto_jax.losses import kto_loss, token_logps
from kto_jax.planning.topology import open_topology

Logps = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def dense_logps(hidden, head, targets):
    """Log-probabilities from an array of all logits, in float32."""
    precision = None if hidden.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btd,dv->btv", hidden, head, precision=precision, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def tokamax_logps(implementation, hidden, head, targets):
    """Log-probabilities by one of tokamax's implementations."""
    api = importlib.import_module("tokamax._src.ops.linear_softmax_cross_entropy_loss.api")
    losses = api.IMPLEMENTATIONS[implementation](
        hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), head, reduction="none"
    )
    return -losses.astype(jnp.float32).reshape(targets.shape)


def contenders(platform: str) -> dict[str, Logps]:
    """The contenders that can run on a platform."""
    found: dict[str, Logps] = {
        "recomputed": functools.partial(token_logps, kept_logits=0),
        "kept": functools.partial(token_logps, kept_logits=sys.maxsize),
        "dense": dense_logps,
    }
    with contextlib.suppress(ImportError):
        api = importlib.import_module("tokamax._src.ops.linear_softmax_cross_entropy_loss.api")
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():
            flags.mark_as_parsed()
        for name in api.IMPLEMENTATIONS:
            if platform == "tpu" or name != "mosaic_tpu":
                found[f"tokamax {name}"] = functools.partial(tokamax_logps, name)
    return found


def make_step(logps: Logps) -> Any:
    """Loss and gradient with respect to hidden states and head; the reference has its own head."""

    def loss(policy, reference, targets, desirable):
        policy_logps = jnp.sum(logps(*policy, targets), axis=1)
        reference_logps = jax.lax.stop_gradient(jnp.sum(logps(*reference, targets), axis=1))
        return jnp.mean(kto_loss(policy_logps, reference_logps, desirable, jnp.zeros(())))

    return jax.jit(jax.value_and_grad(loss))


def make_arguments(options: argparse.Namespace) -> Any:
    """Policy, reference, targets and labels."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (options.batch, options.length)

    def model(hidden_key, head_key):
        hidden = jax.random.normal(hidden_key, (*shape, options.width), options.dtype)
        return hidden, 0.02 * jax.random.normal(head_key, (options.width, options.vocabulary), options.dtype)

    targets = jax.random.randint(keys[4], shape, 0, options.vocabulary)
    return model(*keys[:2]), model(*keys[2:4]), targets, jnp.arange(options.batch) % 2 == 0


def megabytes(program: Any) -> float:
    """Millions of bytes that a compiled program needs beyond its arguments."""
    memory = program.memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs the contenders on this machine's device."""
    arguments = make_arguments(options)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    expected = jax.device_get(make_step(dense_logps)(*exact)[1])
    rows: dict[str, dict[str, Any]] = {}
    programs = {}
    for name, logps in contenders(jax.devices()[0].platform).items():
        try:
            programs[name] = make_step(logps).lower(*arguments).compile()
            loss, gradient = jax.device_get(programs[name](*arguments))
        except Exception as error:  # What a contender cannot do is a result; kernels raise errors of any type.
            programs.pop(name, None)
            rows[name] = {"error": (str(error).splitlines() or [type(error).__name__])[0][:200]}
            continue
        shares = [
            np.max(np.abs(np.float64(one) - right)) / np.max(np.abs(right))
            for one, right in zip(gradient, expected, strict=True)
        ]
        rows[name] = {"megabytes": megabytes(programs[name]), "loss": float(loss), "error_of_gradient": max(shares)}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        rows[name]["milliseconds"] = 1e3 * statistics.median(found)
    return rows


def compile_only(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Compiles the contenders for a described device: memory alone."""
    from benchmarks import gpu_compile

    if options.compile_for in ("h100", "h200"):
        topology = gpu_compile.open_card(options.compile_for)
    else:
        topology = open_topology(options.compile_for)
    device = topology.devices[0]
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        jax.eval_shape(lambda: make_arguments(options)),
    )
    rows: dict[str, dict[str, Any]] = {}
    with gpu_compile.as_default_device(device):
        for name, logps in contenders(device.platform).items():
            start = time.perf_counter()
            try:
                program = make_step(logps).lower(*arguments).compile()
                rows[name] = {"megabytes": megabytes(program)}
            except Exception as error:  # As above.
                rows[name] = {"error": (str(error).splitlines() or [type(error).__name__])[0][:200]}
            rows[name]["compile_seconds"] = time.perf_counter() - start
    return rows


def main() -> None:
    """Prints the table and adds it to a file, by device and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 4, "length": 128, "width": 256, "vocabulary": 32000, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile-for", default="", help="a TPU topology such as v5e:1x1, or h100 or h200")
    parser.add_argument("--out", default="benchmarks/results/head.json")
    options = parser.parse_args()
    if options.compile_for:
        jax.config.update("jax_platforms", "cpu")
    rows = compile_only(options) if options.compile_for else measure(options)
    device = options.compile_for or jax.devices()[0].device_kind
    figures = {"device": device, "jax": jax.__version__, **vars(options), "contenders": rows}
    report(figures)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = "x".join(str(figures[name]) for name in ("batch", "length", "width", "vocabulary"))
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[f"{device} {shape} {options.dtype}"] = {
        key: figures[key] for key in figures if key not in ("out", "compile_for")
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")


def report(figures: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table("contender", "ms, median", "MB beyond the arguments", "error of the gradient")
    for name, row in figures["contenders"].items():
        if "error" in row:
            table.add_row(name, "-", "-", row["error"])
            continue
        milliseconds = f"{row['milliseconds']:.1f}" if "milliseconds" in row else "-"
        error = f"{row['error_of_gradient']:.1e}" if "error_of_gradient" in row else "-"
        table.add_row(name, milliseconds, f"{row['megabytes']:,.0f}", error)
    Console().print(table)


if __name__ == "__main__":
    main()
