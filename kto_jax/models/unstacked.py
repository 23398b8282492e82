"""Parameters whose layers are separate arrays, for decoding on CPU."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with a tuple of layers in place of stacked ones, where that needs no memory: on one CPU device.

    Slices of stacked weights are copied before every matmul on CPU. These layers are views of the same memory, so drop
    them before the parameters are donated. Parameters on accelerators or several devices, or in a dtype unknown to
    NumPy, are returned as they are.
    """
    leaves = jax.tree.leaves(params["layers"])
    on_one_cpu = all({device.platform for device in leaf.devices()} == {"cpu"} for leaf in leaves) and all(
        len(leaf.devices()) == 1 and leaf.dtype.isbuiltin == 1 for leaf in leaves
    )
    if not on_one_cpu:
        return params
    # Not np.asarray, whose result the array would keep for as long as it lives.
    stacked = jax.tree.map(np.from_dlpack, params["layers"])
    num_layers = len(jax.tree.leaves(stacked)[0])
    layers = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers))
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())  # a layer has an axis less than its stack
    return params | {"layers": tuple(jax.device_put(layer, sharding) for layer in layers)}
