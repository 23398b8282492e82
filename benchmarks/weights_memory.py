"""Host memory used to load and export weights, by several processes on one machine.

    python -m benchmarks.weights_memory

Writes a random model of 2 GB in 8 files, loads it in two processes that hold half each (mesh axis fsdp), exports it
from both, and prints the peak private memory of each process: beyond its imports, and beyond its share of the weights.
Mapped pages of the files are not counted, because the kernel can reclaim them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

MIB = 2**20


def private_bytes() -> int:
    """Private (anonymous) memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")


class Peak:
    """Peak private memory while a block runs, sampled a hundred times a second."""

    def __enter__(self) -> Peak:
        self.bytes, self._ended = private_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, private_bytes())

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


def architecture(num_layers: int):
    """A Llama with 15.7 M weights per layer, and 66 M in its tables."""
    from kto_jax.models.config import TransformerConfig

    return TransformerConfig(
        vocab_size=32000, embed_dim=1024, num_layers=num_layers, num_heads=16, num_kv_heads=8, head_dim=64, mlp_dim=4096
    )


def write_model(directory: Path, num_layers: int, num_files: int) -> int:
    """Writes random float32 weights to `num_files` files; returns their bytes."""
    import safetensors.numpy

    from kto_jax.models.families.config_json import write_config_json
    from kto_jax.models.weights.tensors import expected_shapes

    config = architecture(num_layers)
    shapes = expected_shapes(config)
    names, rng = list(shapes), np.random.default_rng(0)
    weight_map, total = {}, 0
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        tensors = {name: rng.random(shapes[name], np.float32) for name in names[number::num_files]}
        safetensors.numpy.save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(write_config_json(config)))
    return total


def work(directory: Path, num_layers: int) -> None:
    """One of the processes: loads, exports, and prints its memory."""
    import jax

    from kto_jax.config import MeshConfig, ProcessesConfig
    from kto_jax.devices.processes import join
    from kto_jax.devices.sharding import constrainer, make_mesh, shardings
    from kto_jax.models.layout import Layout
    from kto_jax.models.model import Model
    from kto_jax.models.weights.export import save_hugging_face
    from kto_jax.models.weights.load import load_params

    join(ProcessesConfig())
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices())
    model = Model.create(architecture(num_layers), layout=Layout(constrain=constrainer(mesh)))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    results: dict[str, float] = {"imports": private_bytes()}
    started = time.perf_counter()
    with Peak() as peak:
        params = jax.block_until_ready(load_params(model, directory, param_dtype="float32", shardings=layout))
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    results |= {"read": peak.bytes, "read_seconds": time.perf_counter() - started, "share": share}
    started = time.perf_counter()
    with Peak() as peak:
        save_hugging_face(directory / "written", model, params, tokenizer_dir=None, model_card="Random weights.")
    results |= {"write": peak.bytes, "write_seconds": time.perf_counter() - started}
    print(json.dumps(results))


def main() -> None:
    """Prints a line for each process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--read", help="what the processes are started with: the folder of the model")
    options = parser.parse_args()
    if options.read:
        return work(Path(options.read), options.layers)
    with tempfile.TemporaryDirectory() as folder:
        total = write_model(Path(folder), options.layers, options.files)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(options.processes),
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.weights_memory", f"--read={folder}", f"--layers={options.layers}"]
        started = [
            subprocess.Popen(
                command, env=environment | {"JAX_PROCESS_ID": str(number)}, stdout=subprocess.PIPE, text=True
            )
            for number in range(options.processes)
        ]
        lines = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process has failed")
    print(f"{total / MIB:,.0f} MiB of weights in {options.files} files, {options.processes} processes")
    for number, line in enumerate(lines):
        one = json.loads(line.splitlines()[-1])
        for task in ("read", "write"):
            beyond = one[task] - one["imports"]
            print(
                f"process {number} {task}s in {one[f'{task}_seconds']:.1f} s: at most {beyond / MIB:,.0f} MiB beyond "
                f"its imports ({one['imports'] / MIB:,.0f} MiB), {(beyond - one['share']) / MIB:,.0f} MiB beyond its "
                f"share of the weights ({one['share'] / MIB:,.0f} MiB) as well"
            )


if __name__ == "__main__":
    main()
