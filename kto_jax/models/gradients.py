"""Products and lookups whose gradients are summed in float32, whatever dtype the forward pass computes in.

JAX gives a gradient the dtype of the array that the operation read. Mixed precision reads bfloat16 copies of float32
weights, so each device would round its share of a gradient to bfloat16, and the shares would be summed in bfloat16.
Accelerators accumulate bfloat16 products in float32 anyway; these functions keep that result.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _at_least_float32(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def wide_gradient_product(x_TI: Float[Array, "T I"], weight_IO: Float[Array, "I O"]) -> Float[Array, "T O"]:
    """x @ weight in the dtype of x; the gradient of the weight is accumulated and returned in at least float32.

    If the weight itself is narrower than float32, its gradient is rounded after the sum over devices.
    """
    return jnp.dot(x_TI, weight_IO.astype(x_TI.dtype))


def _product_forward(x_TI: Array, weight_IO: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    narrow_IO = weight_IO.astype(x_TI.dtype)
    return jnp.dot(x_TI, narrow_IO), (x_TI, narrow_IO, jnp.empty((0,), weight_IO.dtype))


def _product_backward(residuals: tuple[Array, Array, Array], gradient_TO: Array) -> tuple[Array, Array]:
    x_TI, narrow_IO, of_weight = residuals
    gradient_TI = jnp.dot(gradient_TO, narrow_IO.T)
    gradient_IO = jnp.dot(x_TI.T, gradient_TO, preferred_element_type=_at_least_float32(x_TI.dtype))
    return gradient_TI, gradient_IO.astype(of_weight.dtype)


wide_gradient_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def repeat_rows(row_O: Float[Array, " O"], count: int, dtype: Any) -> Float[Array, "count O"]:
    """`count` copies of a row in `dtype`; the gradient is summed over them in at least float32."""
    return jnp.broadcast_to(row_O.astype(dtype)[None], (count, *row_O.shape))


def _repeat_forward(row_O: Array, count: int, dtype: Any) -> tuple[Array, Array]:
    return repeat_rows(row_O, count, dtype), jnp.empty((0,), row_O.dtype)


def _repeat_backward(count: int, dtype: Any, of_row: Array, gradient_TO: Array) -> tuple[Array]:
    del count, dtype
    return (jnp.sum(gradient_TO, axis=0, dtype=_at_least_float32(gradient_TO.dtype)).astype(of_row.dtype),)


repeat_rows.defvjp(_repeat_forward, _repeat_backward)


@jax.custom_vjp
def table_rows(table_VD: Float[Array, "V D"], tokens_T: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of a table. The gradient of a repeated token is summed in at least float32."""
    # `take` returns NaN for ids outside the vocabulary, which the step detects; indexing would clamp them.
    return jnp.take(table_VD, tokens_T, axis=0)


def _rows_forward(table_VD: Array, tokens_T: Array) -> tuple[Array, tuple[Array, Array]]:
    return table_rows(table_VD, tokens_T), (table_VD, tokens_T)


def _rows_backward(residuals: tuple[Array, Array], gradient_TD: Array) -> tuple[Array, None]:
    table_VD, tokens_T = residuals
    wide = _at_least_float32(table_VD.dtype)
    summed_VD = jnp.zeros(table_VD.shape, wide).at[tokens_T].add(gradient_TD.astype(wide))
    return summed_VD.astype(table_VD.dtype), None


table_rows.defvjp(_rows_forward, _rows_backward)
