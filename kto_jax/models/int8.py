"""A frozen model's matrices in int8: a quarter of the memory of float32 ones.

Each output channel of a matrix (each token of the embedding) has a scale of its own, the largest of its weights divided
by 127; a weight is the nearest whole number of scales, symmetric about 0. Among the parameters such a matrix is

    {"int8": [..., in, out], "scales": float32 [..., out]}

in place of an array. Norms and biases stay float32. A layer is turned back where it is used, inside the scan over
layers, so that one layer exists in the compute dtype at a time. The output head is turned back whole, and a file's
matrices of all layers are in float32, over all devices, one name at a time while they are read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

INT8 = "int8"
# Name of a matrix among the parameters -> the axis along which weights share a scale.
_SHARED: dict[str, int] = {"weight": -2, "table": -1}
_PARTS = {"int8", "scales"}
_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """A matrix as the modules see it: whatever asks for it in a dtype gets it in that dtype.

    Attributes:
      values: [..., in, out], or of an embedding [V, D].
      scales: [..., out], or [V].
      shared: axis of `values` that `scales` lacks.
    """

    values: Int8[Array, "..."]
    scales: Float[Array, "..."]
    shared: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, _: Any) -> Int8Matrix:
        # The modules ask for the whole of a parameter, `weight[...]`.
        return self

    def astype(self, dtype: Any) -> Array:
        """The matrix in `dtype`."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return (self.values.astype(wide) * jnp.expand_dims(self.scales, self.shared).astype(wide)).astype(dtype)

    def rows(self, ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Rows of an embedding in float32; NaN for ids that it does not have."""
        return jnp.take(self.values, ids_T, axis=0).astype(jnp.float32) * jnp.take(self.scales, ids_T)[:, None]


def quantised(params: Any) -> Any:
    """Parameters with int8 matrices, from parameters in float32 or bfloat16."""
    return _walk(params, _quantise, lambda leaf: leaf.astype(jnp.float32))


def kept_as(params: Any, dtype: str) -> Any:
    """Parameters in "int8", or in any dtype of arrays."""
    return quantised(params) if dtype == INT8 else jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def quantised_axes(axes: Any) -> Any:
    """Logical axes of `quantised` parameters, from those of the parameters."""

    def split(names: tuple[str, ...], shared: int) -> dict[str, tuple[str, ...]]:
        place = len(names) + shared
        return {"int8": names, "scales": names[:place] + names[place + 1 :]}

    return _walk(axes, split, lambda names: names)


def as_matrices(params: Any) -> Any:
    """The same parameters, an `Int8Matrix` in place of each quantised matrix; others are left alone."""
    if not isinstance(params, dict):
        return params
    return {
        name: Int8Matrix(node["int8"], node["scales"], _SHARED[name]) if _is_quantised(node) else as_matrices(node)
        for name, node in params.items()
    }


def _is_quantised(node: Any) -> bool:
    return isinstance(node, dict) and node.keys() == _PARTS


def _walk(tree: Any, matrix: Any, other: Any) -> Any:
    return {
        name: _walk(node, matrix, other)
        if isinstance(node, dict)
        else matrix(node, _SHARED[name])
        if name in _SHARED
        else other(node)
        for name, node in tree.items()
    }


def quantise(name: str, weights: Array, layout: Any) -> dict[str, Array]:
    """One matrix in int8.

    Args:
      name: what it is called among the parameters: weight or table.
      weights: the matrix.
      layout: shardings of the result.
    """
    return jax.jit(_quantise, static_argnums=1, out_shardings=layout)(weights, _SHARED[name])


def _quantise(weights: Array, shared: int) -> dict[str, Array]:
    weights = weights.astype(jnp.float32)
    scales = jnp.max(jnp.abs(weights), axis=shared, keepdims=True) / _LARGEST
    # A channel of zeros has a scale of 0; whatever it is divided by, it stays zeros.
    values = jnp.round(weights / jnp.where(scales == 0, 1, scales))
    return {"int8": jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), "scales": jnp.squeeze(scales, shared)}
