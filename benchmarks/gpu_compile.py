"""Compiles attention kernels and training steps for H100 and H200 ahead of time, on a machine without a GPU.

    pip install jax-cuda13-plugin jax-cuda13-pjrt tokamax      # the compiler; no other NVIDIA package
    python -m benchmarks.gpu_compile                           # kernels; about 20 s each on two cores
    python -m benchmarks.gpu_compile --steps llama_3_2_1b gemma_3_1b:63488

Each kernel is compiled forward and backward for each head size, dtype, window and soft-cap, as `model.attention="auto"`
chooses it; the choice and its reason are checked too. Those of decoding are compiled for each head size. Nothing runs:
memory is the compiler's figure, and a kernel that compiles may still be wrong or slow.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # The cards are only described.

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from kto_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, ReferenceConfig
from kto_jax.devices.attention_on_mesh import choose_attention, choose_decoding
from kto_jax.devices.chips import CHIPS
from kto_jax.devices.sharding import make_mesh
from kto_jax.models.weights.load import read_config
from kto_jax.objectives import make_objective
from kto_jax.planning.compile_step import Lengths, Task, compile_step
from kto_jax.planning.topology import Topology

ROOT = Path(__file__).parent.parent
MIB, GIB = 2**20, 2**30
# XLA's description of a card, a GpuTargetConfig as text. Figures of an SM are those of compute capability 9.0.
_CARD = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" device_address_bits: 64
  pcie_bandwidth: 34359738368 ecc_enabled: true name: "{name}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 19 patch: 0 }}
device_description_str: "{name}"
"""
_CARDS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "memory": 84942979072, "bandwidth": 3352320000000, "cache": 52428800},
    "h200": {"name": "NVIDIA H200", "memory": 150754820096, "bandwidth": 4814000000000, "cache": 62914560},
}
HEAD_DIMS = (64, 128, 256)
OPTIONS: tuple[dict[str, Any], ...] = ({"window": None, "softcap": None}, {"window": 1024, "softcap": 50.0})


def open_card(name: str, count: int = 1) -> Topology:
    """Described cards of one machine, which can only be compiled for."""
    description = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=_CARD.format(**_CARDS[name])
    )
    return Topology(name, tuple(description.devices), CHIPS[name])


@contextlib.contextmanager
def as_default_device(device: jax.Device) -> Iterator[None]:
    """tokamax asks which device is the default before it chooses a kernel, and Pallas what its kind is."""
    usual = jax.extend.backend.get_default_device
    jax.extend.backend.get_default_device = lambda: device
    kind = AbstractDevice(device.device_kind, getattr(device, "num_cores", None), device.platform)
    try:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
            yield
    finally:
        jax.extend.backend.get_default_device = usual


def compile_kernel(card: Topology, head_dim: int, dtype: str, options: dict[str, Any], length: int) -> dict[str, Any]:
    """Compiles forward and backward pass of one layer's attention over two packed rows: the kernel, seconds, MiB."""
    mesh = make_mesh(MeshConfig(), list(card.devices))
    attend = choose_attention("auto", mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of, sharding=everywhere)

    def total(query: Any, key: Any, value: Any, segments: Any, positions: Any) -> jax.Array:
        mixed = attend(query, key, value, segment_ids_RL=segments, positions_RL=positions, **options)
        return jnp.sum(mixed.astype(jnp.float32))

    heads = (array(2, length, 32, head_dim), *(array(2, length, 8, head_dim),) * 2)
    row = {"card": card.name, "head_dim": head_dim, "dtype": dtype, **options}
    row["kernel"] = attend.kernel_for(heads[0], **options)
    start = time.perf_counter()
    try:
        tokens = (array(2, length, of=jnp.int32),) * 2
        compiled = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(*heads, *tokens).compile()
    except Exception as error:  # The figure is whether it compiles; compilers raise errors of any type.
        lines = str(error).splitlines() or [type(error).__name__]
        return row | {"compiles": False, "error": lines[0], "seconds": time.perf_counter() - start}
    memory: Any = compiled.memory_analysis()
    seconds = time.perf_counter() - start
    return row | {"compiles": True, "seconds": seconds, "temporaries_mib": memory.temp_size_in_bytes / MIB}


def compile_decoding(card: Topology, head_dim: int, window: int | None, slots: int, length: int) -> dict[str, Any]:
    """Compiles the attention of one new token in each slot of a KV cache: the kernel, seconds, MiB."""
    mesh = make_mesh(MeshConfig(), list(card.devices))
    attend = choose_decoding("auto", mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    query, cache = ((slots, 1, 32, head_dim), (slots, 8, length, head_dim))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere) for shape in (query, cache, cache)]
    positions = jax.ShapeDtypeStruct((slots, 1), jnp.int32, sharding=everywhere)

    def decode(*arrays: Any) -> jax.Array:
        return attend(*arrays[:3], positions_BL=arrays[3], window=window)

    row = {"card": card.name, "head_dim": head_dim, "dtype": "bfloat16", "window": window, "softcap": None}
    row |= {"kernel": attend.name, "slots": slots, "cache": length}
    start = time.perf_counter()
    try:
        compiled = jax.jit(decode).lower(*arrays, positions).compile()
    except Exception as error:  # As above.
        lines = str(error).splitlines() or [type(error).__name__]
        return row | {"compiles": False, "error": lines[0], "seconds": time.perf_counter() - start}
    memory: Any = compiled.memory_analysis()
    seconds = time.perf_counter() - start
    return row | {"compiles": True, "seconds": seconds, "temporaries_mib": memory.temp_size_in_bytes / MIB}


def compile_training(card: Topology, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step that benchmarks.device_step takes: what each device needs, and the compiler's seconds."""
    name, _, length_text = name.partition(":")
    length = int(length_text or 4096)
    architecture = read_config(ROOT / "configs" / "architectures" / name)
    architecture = dataclasses.replace(architecture, max_length=max(length, architecture.max_length))
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(dtype="bfloat16", param_dtype=options.kept, remat=options.remat),
        reference=ReferenceConfig(param_dtype=options.kept),
        optimizer=OptimizerConfig(moments_dtype=options.kept, schedule="constant", warmup_steps=0),
        data=dataclasses.replace(DataConfig(), max_length=length),
        batch_size=options.batch,
        microbatch_rows=options.rows,
        row_length=length,
        completion_share=0.5,
    )
    task = Task(architecture, make_objective(config.objective, num_desirable=1, num_undesirable=1))
    per_example = length // options.per_row
    step = compile_step(config, task, card, Lengths(per_example, per_example // 2))
    return {
        "card": card.name,
        "model": name,
        "row_length": length,
        "settings": {key: getattr(options, key) for key in ("kept", "remat", "batch", "rows", "per_row")},
        "gib": step.total / GIB,
        "temporaries_gib": step.temporaries / GIB,
        "fits": step.fits,
        "refusal": step.refusal,
        "seconds": step.compile_seconds,
    }


def main() -> None:
    """Compiles all that was asked for, and writes the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=list(_CARDS), default=["h100", "h200"])
    parser.add_argument("--head-dims", type=int, nargs="*", default=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="*", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row of the kernels")
    parser.add_argument("--slots", type=int, default=16, help="completions decoded at once, over a cache of --length")
    parser.add_argument(
        "--steps", nargs="*", default=[], help="folders of configs/architectures, with :LENGTH for rows"
    )
    parser.add_argument("--kept", choices=("float32", "bfloat16"), default="float32", help="weights and moments")
    parser.add_argument("--remat", choices=("none", "dots", "full", "offload"), default="full")
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--rows", type=int, default=4, help="rows of a microbatch")
    parser.add_argument("--per-row", type=int, default=4, help="examples that fill a row")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_compile.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {"kernels": [], "steps": []}
    results["packages"] = {name: version(name) for name in ("jax", "jax-cuda13-plugin", "tokamax")}
    for card in map(open_card, options.cards):
        with as_default_device(card.devices[0]):
            for head_dim, dtype, of_call in itertools.product(options.head_dims, options.dtypes, OPTIONS):
                keep(
                    results["kernels"], compile_kernel(card, head_dim, dtype, of_call, options.length), options, results
                )
            for head_dim, window in itertools.product(options.head_dims, (None, 1024)):
                row = compile_decoding(card, head_dim, window, options.slots, options.length)
                keep(results.setdefault("decoding", []), row, options, results)
            for name in options.steps:
                keep(results["steps"], compile_training(card, name, options), options, results)


def keep(rows: list[dict[str, Any]], row: dict[str, Any], options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Prints a row, puts it in place of an older one of the same kind, and writes all."""
    of_kind = ("card", "head_dim", "dtype", "window", "softcap", "model", "row_length", "settings", "slots", "cache")
    rows[:] = [old for old in rows if any(old.get(key) != row.get(key) for key in of_kind)] + [row]
    print(json.dumps(row), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
