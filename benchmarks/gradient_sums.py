"""Three ways in which a TPU slice can reduce the gradient of a matrix that fsdp shards over all of its chips, compiled.

    python -m benchmarks.gradient_sums --topology=v5e:16x16

- left: the compiler places the reduction, as in training.
- named: `psum_scatter` under `shard_map` requests each device's part.
- staged: one `psum_scatter` after the other, over one dimension of the torus at a time.

Compiles only: needs the TPU compiler (`pip install "jax[tpu]==0.10.2"`), but no TPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from kto_jax.config import MeshConfig
from kto_jax.devices.sharding import make_mesh
from kto_jax.planning.hlo import Collective, find_collectives
from kto_jax.planning.topology import open_topology

# A feed-forward matrix of Llama-3.1-8B, and one row of tokens per chip.
EMBED, MLP, TOKENS = 4096, 14336, 2048
_AXIS = "fsdp"


def gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient of a matrix [D, F] that tokens [T, D] are multiplied by."""
    return jnp.dot(x.T, cotangent)


def rings(sizes: tuple[int, ...]) -> list[list[list[int]]]:
    """The rings of each dimension of a torus, as positions of their devices in row-major order."""
    places = np.arange(np.prod(sizes)).reshape(sizes)
    return [np.moveaxis(places, axis, -1).reshape(-1, size).tolist() for axis, size in enumerate(sizes)]


def _scattered(x: jax.Array, cotangent: jax.Array, *, groups: Sequence[list[list[int]] | None]) -> jax.Array:
    part = gradient(x, cotangent)
    for group in groups:
        part = jax.lax.psum_scatter(part, _AXIS, scatter_dimension=0, axis_index_groups=group, tiled=True)
    return part


def ways(mesh: Mesh, sizes: tuple[int, ...]) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Functions of tokens and cotangents, both sharded over all devices, that return the gradient sharded likewise."""
    spec = PartitionSpec(_AXIS)
    by_hand = partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    return {
        "left": gradient,
        "named": by_hand(partial(_scattered, groups=[None])),
        "staged": by_hand(partial(_scattered, groups=rings(sizes))),
    }


def compiled_sums(topology: str) -> dict[str, list[Collective]]:
    """The collectives of each variant, compiled for a slice."""
    devices = list(open_topology(topology).devices)
    sizes = tuple(int(size) for size in topology.split(":")[1].split("x"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    layout = NamedSharding(mesh, PartitionSpec(_AXIS))
    tokens = TOKENS * len(devices)
    given = [jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16, sharding=layout) for width in (EMBED, MLP)]
    found = {}
    for name, way in ways(mesh, sizes).items():
        text = jax.jit(way, out_shardings=layout).lower(*given).compile().as_text() or ""
        found[name] = find_collectives(text, num_devices=len(devices))
    return found


def main() -> None:
    """Compiles the three variants and prints the bytes that they send."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16", help="of one slice, such as v5e:16x16 or v5p:4x4x4")
    topology = parser.parse_args().topology
    table = Table("way", "collectives", "MiB sent by a chip", title=f"gradient of [{EMBED}, {MLP}] on {topology}")
    for name, collectives in compiled_sums(topology).items():
        times = [each.times(unknown=1) for each in collectives]
        kinds = ", ".join(
            f"{n} × {each.kind} over {each.num_devices}" for n, each in zip(times, collectives, strict=True)
        )
        sent = sum(n * each.bytes_sent for n, each in zip(times, collectives, strict=True))
        table.add_row(name, kinds, f"{sent / 2**20:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
