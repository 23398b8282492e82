"""Parameters arranged for decoding on CPU: each layer's arrays by themselves, and optionally transposed matrices."""

from __future__ import annotations

import dataclasses
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
    """Parameters with a tuple of layers in place of stacked ones, where that needs no memory: on one CPU device.

    Slices of stacked weights are copied before every matmul on CPU. These layers are views of the same memory, so drop
    them before the parameters are donated. Parameters whose layers are separate already, on accelerators or on several
    devices, or in a dtype unknown to NumPy, are returned as they are.
    """
    if not _can_be_unstacked(params["layers"]):
        return params
    leaves, structure = jax.tree.flatten(params["layers"])
    layers = zip(*map(_views, leaves), strict=True)
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in layers)}


def transpose_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as from `unstack_layers`, with each layer's matrices transposed: a step of 16 rows takes 0.8 the time.

    Matrices with adapters, quantised ones, routers and experts are not transposed.

    Args:
      params: stacked parameters, which lose their layers: each stack is freed when its matrices are transposed.
    """
    if not _can_be_unstacked(params["layers"]):
        return params
    structure = jax.tree.structure(params["layers"])
    stacks, _ = jax.tree_util.tree_flatten_with_path(params.pop("layers"))
    transpose, separate = jax.jit(jnp.transpose), []
    while stacks:
        path, stack = stacks.pop(0)
        arrays: list[Any] = _views(stack)
        is_router = jax.tree_util.DictKey("router") in path
        if path[-1] == jax.tree_util.DictKey("weight") and stack.ndim == 3 and not is_router:
            arrays = [TransposedMatrix(transpose(array)) for array in arrays]
        separate.append(arrays)
    layers = zip(*separate, strict=True)
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in layers)}


def _can_be_unstacked(layers: Any) -> bool:
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
