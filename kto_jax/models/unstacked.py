"""Parameters arranged for decoding: each layer's arrays by themselves, and on CPU optionally transposed matrices.

CPUs and GPUs copy a slice of stacked weights before every product with it; a step of decoding, whose time goes into
reading the weights, then reads them twice and writes them once. TPUs read the slice in place.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedMatrix:
    """A layer's matrix, transposed.

    Attributes:
      values: [out, in].
    """

    values: Any

    def __getitem__(self, _: Any) -> TransposedMatrix:
        # The modules read a whole parameter as `weight[...]`.
        return self


def product_with_transposed(
    product: Callable[[Array, Array], Array], x_TI: Float[Array, "T I"], weight_OI: Float[Array, "O I"]
) -> Float[Array, "T O"]:
    """x · weightᵀ as the transpose of weight · xᵀ: on CPU, for a few rows, two thirds of the time of x · weight."""
    # Without the barrier, XLA would swap the operands back.
    return jax.lax.optimization_barrier(product(weight_OI, x_TI.T)).T


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with a tuple of layers in place of stacked ones, on one CPU device or on the GPUs of one process.

    On CPU these layers are views of the same memory, so drop them before the parameters are donated. On GPUs they are
    copies, which are made only if the devices have room for them; if not, a log line says so. Parameters whose layers
    are separate already, on other devices, or in a dtype unknown to NumPy, are returned as they are.
    """
    leaves, structure = jax.tree.flatten(params["layers"])
    if _are_views_possible(params["layers"]):
        separate = map(_views, leaves)
    elif _are_on_gpus(params["layers"]) and _have_room(leaves):
        separate = map(split_stack, leaves)
    else:
        return params
    layers = zip(*separate, strict=True)
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in layers)}


def transpose_layers(params: dict[str, Any]) -> dict[str, Any]:
    """As `unstack_layers`, and on CPU each layer's matrices are transposed: a step of 16 rows takes 0.8 the time.

    Matrices with adapters, quantised ones, routers and experts are not transposed.

    Args:
      params: stacked parameters, which lose their layers: each stack is freed when it is taken apart, so no room is
        needed for all layers twice.
    """
    on_cpu = _are_views_possible(params["layers"])
    if not on_cpu and not _are_on_gpus(params["layers"]):
        return params
    structure = jax.tree.structure(params["layers"])
    stacks, _ = jax.tree_util.tree_flatten_with_path(params.pop("layers"))
    transpose, separate = jax.jit(jnp.transpose), []
    while stacks:
        path, stack = stacks.pop(0)
        arrays: list[Any] = _views(stack) if on_cpu else split_stack(stack)
        is_router = jax.tree_util.DictKey("router") in path
        if on_cpu and path[-1] == jax.tree_util.DictKey("weight") and stack.ndim == 3 and not is_router:
            arrays = [TransposedMatrix(transpose(array)) for array in arrays]
        separate.append(arrays)
    layers = zip(*separate, strict=True)
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in layers)}


def split_stack(stack: Array) -> list[Array]:
    """Copies of a stack's arrays, sharded as they are in the stack."""
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return list(_split(len(stack), sharding)(stack))


@functools.cache
def _split(count: int, sharding: Any) -> Callable[[Array], tuple[Array, ...]]:
    return jax.jit(tuple, out_shardings=(sharding,) * count)


def _are_on_gpus(layers: Any) -> bool:
    """Whether the layers are stacked, and on GPUs of this process alone: others would have to decide alike."""
    return not isinstance(layers, tuple) and all(
        leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "gpu" for leaf in jax.tree.leaves(layers)
    )


def _have_room(stacks: list[Array]) -> bool:
    """Whether every device has room for its part of the stacks once more, and a fifth."""
    needed: dict[jax.Device, int] = {}
    for stack in stacks:
        for shard in stack.addressable_shards:
            needed[shard.device] = needed.get(shard.device, 0) + shard.data.nbytes
    for device, size in needed.items():
        free = _free_bytes(device)
        if free < 1.2 * size:
            _log_no_room(round(size / 2**30), round(free / 2**30))
            return False
    return True


def _free_bytes(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


@functools.cache
def _log_no_room(size: int, free: int) -> None:
    logging.getLogger(__name__).warning(
        "decoding copies every layer's weights in every step, because separate layers would take %d GiB more on a GPU "
        "that has %d GiB left",
        size,
        free,
    )


def _are_views_possible(layers: Any) -> bool:
    return not isinstance(layers, tuple) and all(
        len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu" and leaf.dtype.isbuiltin == 1
        for leaf in jax.tree.leaves(layers)
    )


def _views(stack: Array) -> list[Array]:
    """The arrays of a stack, in the same memory."""
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())  # a layer has an axis less than its stack
    # Not np.asarray, whose result the array would keep for as long as it lives.
    return [jax.device_put(array, sharding) for array in np.from_dlpack(stack)]  # type: ignore[arg-type]
