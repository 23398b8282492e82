"""Parameters of a frozen model whose matrices are quantised: int8, nf4 or int4.

int8 keeps every matrix, embedding and output head among them, in eight bits (int8.py). nf4 and int4 keep the matrices
of the layers in four bits (four_bits.py), and embedding and head in bfloat16, as bitsandbytes does. Norms, biases,
routers, and reward and value heads stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kto_jax.models.four_bits import Int4Matrix, Nf4Matrix, quantise_int4, quantise_nf4
from kto_jax.models.int8 import Int8Matrix, quantise_int8

QuantisedMatrix = Int8Matrix | Nf4Matrix | Int4Matrix
QUANTISED = ("int8", "nf4", "int4")
"""Dtypes of parameters that are no dtypes of arrays."""
BLOCKS = "/blocks"
"""Ends the logical axis of the scales of blocks along an axis."""
# Name of a matrix among the parameters -> the axis along which int8 weights share a scale.
_SHARED: dict[str, int] = {"weight": -2, "table": -1}
# Matrices that stay as they are: a rounded router would send tokens to other experts.
_KEPT = "router"
_TRUNK = ("embed", "layers", "head")


def quantise(weights: Array, kind: str, shared: int) -> QuantisedMatrix:
    """Quantises one matrix.

    Args:
      weights: the matrix.
      kind: one of `QUANTISED`.
      shared: the axis along which int8 weights share a scale.
    """
    if kind == "int8":
        return quantise_int8(weights, shared)
    return quantise_nf4(weights) if kind == "nf4" else quantise_int4(weights)


def cast_params(params: Any, dtype: Any) -> Any:
    """Parameters in float32 or bfloat16, quantised to one of `QUANTISED`, or cast to any dtype of arrays."""
    if dtype not in QUANTISED:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return _map(params, dtype, lambda leaf, shared: quantise(leaf, dtype, shared), lambda leaf, kept: leaf.astype(kept))


def quantised_axes(axes: Any, dtype: str) -> Any:
    """Logical axes of parameters in one of `QUANTISED`, from those of the parameters."""

    def split(names: tuple[str, ...], shared: int) -> QuantisedMatrix:
        if dtype == "int8":
            place = len(names) + shared
            return Int8Matrix(names, names[:place] + names[place + 1 :], shared)
        scales = (*names[:-2], names[-2] + BLOCKS, names[-1])
        return Nf4Matrix(names, scales) if dtype == "nf4" else Int4Matrix(names, scales)

    return _map(axes, dtype, split, lambda names, _: names)


def _map(
    params: dict[str, Any], dtype: str, matrix: Callable[[Any, int], Any], other: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """Applies `matrix` to each matrix to quantise and its shared axis, and `other` to all other leaves and a dtype."""
    parts = _TRUNK if dtype == "int8" else ("layers",)

    def walk(node: Any, name: str, part: str, is_kept: bool) -> Any:
        if isinstance(node, dict):
            return {key: walk(child, key, part, is_kept or key == _KEPT) for key, child in node.items()}
        is_matrix = part in _TRUNK and name in _SHARED and not is_kept
        if is_matrix and part in parts:
            return matrix(node, _SHARED[name])
        return other(node, jnp.bfloat16 if is_matrix else jnp.float32)

    return {name: walk(node, name, name, False) for name, node in params.items()}
