"""Flips single bits in what a run keeps and counts how many are found, and measures what the checks cost.

    python -m benchmarks.damage --flips=40            # at 40 places of each kind of file, in float32 and bfloat16
    python -m benchmarks.damage --flips=0 --gb=1      # only the cost, on a state of this size

A flip counts as found if reading reports it, and as unused if what is read is the same to the bit: a checkpoint's files
have bytes that nothing reads. The exit code is 1 if a flip in other files is not found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from kto_jax.config import CheckpointConfig, ConfigError, MeshConfig
from kto_jax.data.batches.reference_logps import damage_of as damage_of_store
from kto_jax.data.batches.reference_logps import open_store
from kto_jax.data.index.index import open_index
from kto_jax.devices.sharding import make_mesh
from kto_jax.storage.sums import check_export, damage_of, write_sums
from kto_jax.training import checkpoints as saving
from kto_jax.training.checkpoint_reading import StoredTree, quiet_libraries
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.leaf_digests import digest_leaves
from kto_jax.training.state import TrainState
from kto_jax.training.verification import check_tree

ROOT = Path(__file__).parent.parent


_WITH_UNUSED_BYTES = ("checkpoint", "reference")


class Kept(NamedTuple):
    """A kind of files, and what reads them: it raises a ConfigError, or returns what is wrong."""

    name: str
    files: list[Path]
    read: Callable[[], object]


def make_run(folder: Path, dtype: str) -> Path:
    """Trains the tiny model for two steps; its index is in folder/cache."""
    run = folder / "run"
    settings = {"max_steps": 2, "model.param_dtype": dtype, "export.dtype": dtype, "samples.num_prompts": 0}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "kto_jax.train", "--config=configs/tiny.py", f"--workdir={run}", *flags]
    environment = os.environ | {"KTO_JAX_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    return run


def kept_by(run: Path) -> Iterator[Kept]:
    """What a run keeps, in the folder and in the cache."""
    quiet_libraries()
    for name, is_step in (("2", True), ("reference", False)):
        stored = StoredTree(epath.Path(run / "checkpoints" / name), is_step=is_step)
        data = run / "checkpoints" / name / "state" / "d"
        yield Kept(
            "checkpoint" if is_step else "reference", _files(data), lambda stored=stored: check_tree(stored) and ""
        )
    (manifest,) = (run.parent / "cache" / "indices").glob("*/manifest.json")
    yield Kept("index", _files(manifest.parent), lambda: open_index(manifest.parent) and "")
    yield Kept("policy/", _files(run / "policy"), lambda: _check_whole(run / "policy"))
    store = open_store(run.parent / "store", 1000, 50, 16)
    for step in range(50):
        store.write(step, np.arange(16) + 16 * step, np.float32(np.arange(16)), np.float32(np.arange(16)))
    yield Kept("reference store", _files(store.directory), lambda: damage_of_store(store.directory))


def _check_whole(folder: Path) -> str:
    for weights in (False, True):
        check_export(folder, weights=weights)
    return ""


def _files(folder: Path) -> list[Path]:
    """The files that are read; README.md is left out of the digests, and people edit it."""
    return sorted(path for path in folder.iterdir() if path.stat().st_size and path.name != "README.md")


def count_found(kept: Kept, flips: int, choose: random.Random) -> int:
    """Flips bits one after the other, each anywhere in the files with equal probability; returns how many are found."""
    assert not kept.read()
    found = 0
    for _ in range(flips):
        (path,) = choose.choices(kept.files, [file.stat().st_size for file in kept.files])
        bit = choose.randrange(8 * path.stat().st_size)
        with flipped(path, bit):
            try:
                found += bool(kept.read())
            except ConfigError:
                found += 1
    assert not kept.read()
    return found


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """A file with one bit flipped, while the body runs."""
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(whole)


def measure_flips(flips: int, seed: int) -> bool:
    """Prints how many flips are found, as a Markdown table; returns whether all are that must be."""
    all_found = True
    print("| what | dtype | flips | found | in bytes that are not read |\n|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            for kept in kept_by(make_run(Path(folder), dtype)):
                found = count_found(kept, flips, random.Random(f"{seed} {kept.name} {dtype}"))
                print(f"| {kept.name} | {dtype} | {flips} | {found} | {flips - found} |", flush=True)
                all_found &= found == flips or kept.name in _WITH_UNUSED_BYTES
    return all_found


# ---------------------------------------------------------------------------------------------------- cost
class Timer:
    """Sums the seconds that functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; its time is added."""

        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def measure_cost(gb: float) -> None:
    """Prints the seconds per GB of each check, and the share of a save."""
    print("\n| check | seconds per GB |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        _measure_save(Path(folder) / "run", gb)
        file = Path(folder) / "files" / "model.safetensors"
        file.parent.mkdir()
        block = np.random.default_rng(0).bytes(100_000_000)
        with file.open("wb") as out:
            for _ in range(max(1, round(10 * gb))):
                out.write(block)
        size = file.stat().st_size / 1e9
        for name, function in (("write SHA256SUMS", write_sums), ("compare with SHA256SUMS", damage_of)):
            started = time.perf_counter()
            function(file.parent)
            print(f"| {name} (index, policy/) | {(time.perf_counter() - started) / size:.2f} |", flush=True)


def _measure_save(run: Path, gb: float) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = max(1, round(gb * 1e9 / 4 / 2**20 / 16))
    draw = jax.jit(lambda key: jax.random.normal(key, (rows, 2**20)), out_shardings=place)
    policy = {f"layer{number}": draw(jax.random.key(number)) for number in range(16)}
    number = jax.device_put(jnp.int32(1), place)
    state = TrainState(
        step=number, policy=policy, reference={}, opt_state={}, objective_state={}, num_bad_steps=number
    )  # fmt: skip
    size = sum(leaf.nbytes for leaf in policy.values()) / 1e9
    digests, checks, whole = Timer(), Timer(), Timer()
    with contextlib.closing(Checkpoints(run, CheckpointConfig(keep=1))) as checkpoints:
        checkpoints.save(1, state, None)  # compiles what computes the digests
        saving.digest_leaves = digests.timed(digest_leaves)
        Checkpoints._read_back = checks.timed(Checkpoints._read_back)  # type: ignore[method-assign]
        for step in (2, 3, 4):
            whole.timed(checkpoints.save)(step, state, None)
        assert not checkpoints.failure
        # Reading back computes digests too: one of two.
        own = digests.seconds / 2
        print(f"| digests of a state on its devices | {own / 3 / size:.2f} |")
        print(f"| read a checkpoint back, with digests | {checks.seconds / 3 / size:.2f} |")
        print(f"| a whole save | {whole.seconds / 3 / size:.2f} |")
        share = (own + checks.seconds) / whole.seconds
        started = time.perf_counter()
        check_tree(StoredTree(epath.Path(run / "checkpoints" / "4")))
        print(f"| kto_jax.verify of a checkpoint | {(time.perf_counter() - started) / size:.2f} |")
        print(
            f"| verification as a share of a save | {share:.0%} of {whole.seconds / 3:.1f} s for {size:.2f} GB |",
            flush=True,
        )


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=40, help="bits flipped in each kind of file; 0 for none")
    parser.add_argument("--gb", type=float, default=0.0, help="size of the state whose checks are timed; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    options = parser.parse_args()
    all_found = measure_flips(options.flips, options.seed) if options.flips else True
    if options.gb:
        measure_cost(options.gb)
    return int(not all_found)


if __name__ == "__main__":
    sys.exit(main())
