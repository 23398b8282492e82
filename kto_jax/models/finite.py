"""Finding values that are not finite, on the devices that hold them and without communication."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool


def find_nonfinite(tree: Any) -> list[str]:
    """Paths of the floating-point arrays of a tree that hold a NaN or infinite value on a device of this process.

    Args:
      tree: arrays that are all on one device, or all sharded over one mesh.
    """
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if not arrays:
        return []
    leaves = tuple(arrays.values())
    check = _all_finite
    if isinstance(sharding := leaves[0].sharding, NamedSharding):
        # Reductions over the mesh would be one collective per array, and CPU devices may run those in different orders.
        check = jax.shard_map(
            _all_finite,
            mesh=sharding.mesh,
            in_specs=(tuple(leaf.sharding.spec for leaf in leaves),),
            out_specs=PartitionSpec(sharding.mesh.axis_names),
            check_vma=False,
        )
    flags = jax.jit(check)(leaves)
    finite = np.all([np.asarray(shard.data).all(axis=0) for shard in flags.addressable_shards], axis=0)
    return [name for name, is_finite in zip(arrays, finite, strict=True) if not is_finite]


def _all_finite(leaves: tuple[Array, ...]) -> Bool[Array, "1 N"]:
    """Whether each of N arrays is finite on this device."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])[None]
