"""Digests of arrays, computed on the devices that hold them: equal on every mesh, and changed by any flipped bit.

    digest(x) = sum over the elements of bits(x) * (2 * index + 1)    modulo 2^32

`index` is the position in the whole array in row-major order, and `bits(x)` the element's bits as an unsigned integer.
An addition modulo 2^32 is associative, so the sum does not depend on how an array is sharded. A changed bit of one
element adds an odd number times a power of two, which is never 0 modulo 2^32. Damage to many elements stays unnoticed
with a probability of about 2^-32. A digest finds damage, not an attacker.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from kto_jax.devices import processes


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as policy/layers/mlp/up; elements of tuples are named by position."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def digest_leaves(tree: Any) -> dict[str, str]:
    """The digest of each array by path, in hexadecimal; every process must call this, and all get the same answer.

    Each device sums its own part of every array, without communication between devices. The host adds these sums,
    counting each replicated part once.

    Args:
      tree: arrays, or random keys, in any shardings.
    """
    leaves = {path: _without_keys(leaf) for path, leaf in named_leaves(tree).items()}
    sums = dict.fromkeys(leaves, 0)
    for mesh in dict.fromkeys(_mesh(leaf) for leaf in leaves.values()):
        here = [path for path, leaf in leaves.items() if _mesh(leaf) == mesh]
        sums |= dict(zip(here, _sum_own_parts(mesh, [leaves[path] for path in here]), strict=True))
    of_processes = [json.loads(text) for text in processes.exchange_text(json.dumps(list(sums.values())))]
    totals = [sum(parts) % 2**32 for parts in zip(*of_processes, strict=True)]
    return {path: f"{total:08x}" for path, total in zip(sums, totals, strict=True)}


def differing(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """Paths in `found` whose digest differs from the recorded one, or was not recorded."""
    return [path for path, digest in found.items() if recorded.get(path) != digest]


def _without_keys(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _mesh(leaf: Array) -> Mesh | None:
    return leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None  # type: ignore[return-value]


def _sum_own_parts(mesh: Mesh | None, leaves: Sequence[Array]) -> list[int]:
    """The sum of each array over the parts that this process owns."""
    if mesh is None:
        return [int(total) for total in jax.device_get(_sum_whole(tuple(leaves)))]
    specs = tuple(leaf.sharding.spec for leaf in leaves)  # type: ignore[attr-defined]
    sums = _summing(mesh, specs)(tuple(leaves))
    by_device = {shard.device: np.asarray(shard.data)[0] for shard in sums.addressable_shards}
    return [
        sum(int(by_device[shard.device][number]) for shard in leaf.addressable_shards if shard.replica_id == 0)
        for number, leaf in enumerate(leaves)
    ]


@jax.jit
def _sum_whole(leaves: tuple[Array, ...]) -> list[UInt32[Array, ""]]:
    return [_sum_part(leaf, [0] * leaf.ndim, leaf.shape) for leaf in leaves]


@functools.lru_cache(maxsize=32)
def _summing(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """The compiled program that sums each device's part of arrays with these shardings: [devices, arrays]."""

    def sum_parts(leaves: tuple[Array, ...]) -> UInt32[Array, "1 N"]:
        return jnp.stack([_sum_on_device(mesh, spec, leaf) for spec, leaf in zip(specs, leaves, strict=True)])[None]

    places = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(sum_parts, mesh=mesh, in_specs=(specs,), out_specs=places, check_vma=False))


def _sum_on_device(mesh: Mesh, spec: PartitionSpec, part: Array) -> UInt32[Array, ""]:
    """The sum of the part of an array that one device holds, inside `shard_map`."""
    starts: list[Any] = [0] * part.ndim
    shape = list(part.shape)
    for axis, names in enumerate(spec):
        if names:
            starts[axis] = jax.lax.axis_index(names).astype(jnp.uint32) * part.shape[axis]
            shape[axis] *= math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    return _sum_part(part, starts, shape)


def _sum_part(part: Array, starts: Sequence[Any], shape: Sequence[int]) -> UInt32[Array, ""]:
    """The sum of a part of an array.

    Args:
      part: the elements.
      starts: position of the part's first element along each axis of the whole array.
      shape: of the whole array.
    """
    index, stride = jnp.zeros(part.shape, jnp.uint32), 1
    for axis in reversed(range(part.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) + jnp.uint32(starts[axis])
        index += position * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    words = _words(part)
    if words.ndim == part.ndim:
        return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
    low, high = words[..., 0], words[..., 1]
    return jnp.sum(low * (4 * index + 1) + high * (4 * index + 3), dtype=jnp.uint32)


def _words(part: Array) -> Array:
    """The bits of each element as uint32; elements of 64 bits become two of them, along a last axis."""
    if part.dtype == jnp.bool_:
        return part.astype(jnp.uint32)
    if part.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(part, jnp.uint32)
    return jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}").astype(jnp.uint32)
