"""A frozen model's matrices in int8: a quarter of the memory of float32.

Each output channel of a matrix (each token of the embedding) has its own scale, its largest absolute weight divided by
127; quantisation is symmetric, to the nearest multiple of the scale. An `Int8Matrix` takes the array's place among the
parameters. Norms, biases, routers, and reward and value heads stay float32.

A layer is dequantised where it is used, inside the scan over layers, so only one layer exists in the compute dtype at a
time. The output head is dequantised whole. Loading holds one matrix of all layers in float32 at a time, sharded over
all devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """A quantised matrix. Modules call `astype` or `rows` to dequantise it.

    Its fields are arrays, or what a tree of the same structure holds for each array (shapes, shardings, axes).

    Attributes:
      int8: weights in units of their scale, [..., in, out], or [V, D] for an embedding.
      scales: float32 [..., out], or [V].
      shared: the axis of `int8` that `scales` lacks.
    """

    kind: ClassVar[str] = "int8"
    int8: Any
    scales: Any
    shared: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, _: Any) -> Int8Matrix:
        # The modules read a whole parameter as `weight[...]`.
        return self

    @property
    def codes(self) -> Any:
        """The integers."""
        return self.int8

    def astype(self, dtype: Any) -> Array:
        """The matrix in `dtype`."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return (self.int8.astype(wide) * jnp.expand_dims(self.scales, self.shared).astype(wide)).astype(dtype)

    def rows(self, ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Rows of an embedding in float32; NaN for ids outside the vocabulary."""
        return jnp.take(self.int8, ids_T, axis=0).astype(jnp.float32) * jnp.take(self.scales, ids_T)[:, None]


def quantise_int8(weights: Array, shared: int) -> Int8Matrix:
    """Quantises one matrix to int8.

    Args:
      weights: the matrix.
      shared: the axis along which weights share a scale.
    """
    weights = weights.astype(jnp.float32)
    scales = jnp.max(jnp.abs(weights), axis=shared, keepdims=True) / _LARGEST
    # A channel of zeros has a scale of 0; divided by 1 instead, it stays 0.
    values = jnp.clip(jnp.round(weights / jnp.where(scales == 0, 1, scales)), -_LARGEST, _LARGEST)
    return Int8Matrix(values.astype(jnp.int8), jnp.squeeze(scales, shared), shared)
