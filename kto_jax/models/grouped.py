"""Grouped matmul: rows sorted by group, times the matrix of their group.

TPUs have an instruction for it (`jax.lax.ragged_dot`). On other platforms XLA would multiply every row by every matrix,
so a loop multiplies blocks of rows, each with the matrix of its group: its work grows with the rows, not with the
number of groups.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows of a block. More would be multiplied in vain where groups end, fewer would read each matrix more often.
_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 8


@jax.custom_vjp
def grouped_product(
    x_MI: Float[Array, "M I"], weight_EIO: Float[Array, "E I O"], sizes_E: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Row m of x times the matrix of its group, in the dtype of x: the first sizes[0] rows are group 0's, and so on.

    Rows past the last group give 0. The gradient of the matrices is summed in at least float32.
    """
    return _product(x_MI, weight_EIO.astype(x_MI.dtype), sizes_E, transposed=False)


def _product_forward(x_MI: Array, weight_EIO: Array, sizes_E: Array) -> tuple[Array, tuple[Array, ...]]:
    narrow_EIO = weight_EIO.astype(x_MI.dtype)
    of_weight = jnp.empty((0,), weight_EIO.dtype)
    return _product(x_MI, narrow_EIO, sizes_E, transposed=False), (x_MI, narrow_EIO, sizes_E, of_weight)


def _product_backward(residuals: tuple[Array, ...], gradient_MO: Array) -> tuple[Array, Array, None]:
    x_MI, narrow_EIO, sizes_E, of_weight = residuals
    gradient_MI = _product(gradient_MO, narrow_EIO, sizes_E, transposed=True)
    gradient_EIO = jax.lax.platform_dependent(
        x_MI, gradient_MO, sizes_E, tpu=ragged_gradient, default=gradient_by_blocks
    )
    return gradient_MI, gradient_EIO.astype(of_weight.dtype), None


grouped_product.defvjp(_product_forward, _product_backward)


def _product(x_MI: Array, weight_EIO: Array, sizes_E: Array, *, transposed: bool) -> Array:
    """x times the matrices, or times the transposed matrices."""
    ragged, by_blocks = (partial(product, transposed=transposed) for product in (ragged_product, product_by_blocks))
    return jax.lax.platform_dependent(x_MI, weight_EIO, sizes_E, tpu=ragged, default=by_blocks)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


# ------------------------------------------------------------------------------------------------ one instruction


def ragged_product(x_MI: Array, weight_EIO: Array, sizes_E: Array, *, transposed: bool) -> Array:
    """The product by `jax.lax.ragged_dot`."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    product_MO = jax.lax.ragged_dot_general(
        x_MI, weight_EIO, sizes_E, numbers, precision=_precision(x_MI.dtype), preferred_element_type=x_MI.dtype
    )
    # The instruction does not say what it leaves in the rows of no group.
    is_grouped_M1 = jnp.arange(len(x_MI))[:, None] < jnp.sum(sizes_E)
    return jnp.where(is_grouped_M1, product_MO, 0)


def ragged_gradient(x_MI: Array, gradient_MO: Array, sizes_E: Array) -> Array:
    """The gradient of the matrices by `jax.lax.ragged_dot_general`, in at least float32."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(
        x_MI, gradient_MO, sizes_E, numbers,
        precision=_precision(x_MI.dtype), preferred_element_type=jnp.promote_types(x_MI.dtype, jnp.float32),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ a loop over blocks


def _block_size(num_rows: int, num_groups: int) -> int:
    """The power of two nearest below the mean size of a group, within limits."""
    mean = max(num_rows // num_groups, 1)
    return min(max(1 << (mean.bit_length() - 1), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _blocks(num_rows: int, sizes_E: Array) -> tuple[int, tuple[Array, Array, Array], Array]:
    """How the groups are divided into blocks of rows.

    Returns:
      The rows of a block. For each block its group, its first row and how many of its rows are the group's. The number
      of blocks; the arrays may be longer.
    """
    block = _block_size(num_rows, len(sizes_E))
    last_E = jnp.cumsum(-(-sizes_E // block))
    number_B = jnp.arange(num_rows // block + len(sizes_E))
    group_B = jnp.minimum(jnp.searchsorted(last_E, number_B, side="right"), len(sizes_E) - 1)
    done_B = block * (number_B - (last_E - -(-sizes_E // block))[group_B])
    start_B = (jnp.cumsum(sizes_E) - sizes_E)[group_B] + done_B
    return block, (group_B, start_B, sizes_E[group_B] - done_B), last_E[-1]


def product_by_blocks(x_MI: Array, weight_EIO: Array, sizes_E: Array, *, transposed: bool) -> Array:
    """The product by a loop over blocks of rows."""
    block, (group_B, start_B, count_B), num_blocks = _blocks(len(x_MI), sizes_E)
    x_MI = jnp.pad(x_MI, ((0, block), (0, 0)))
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def body(number: Array, out_MO: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(x_MI, start_B[number], block)
        weight = jax.lax.dynamic_index_in_dim(weight_EIO, group_B[number], keepdims=False)
        product = jax.lax.dot_general(
            rows, weight, contracted, precision=_precision(rows.dtype), preferred_element_type=rows.dtype
        )
        # The rows after the group's end are the next group's, whose blocks come later.
        product = jnp.where(jnp.arange(block)[:, None] < count_B[number], product, 0)
        return jax.lax.dynamic_update_slice_in_dim(out_MO, product, start_B[number], axis=0)

    width = weight_EIO.shape[1 if transposed else 2]
    return jax.lax.fori_loop(0, num_blocks, body, jnp.zeros((len(x_MI), width), x_MI.dtype))[: len(x_MI) - block]


def gradient_by_blocks(x_MI: Array, gradient_MO: Array, sizes_E: Array) -> Array:
    """The gradient of the matrices by a loop over blocks of rows, in at least float32."""
    block, (group_B, start_B, count_B), num_blocks = _blocks(len(x_MI), sizes_E)
    x_MI, gradient_MO = (jnp.pad(x, ((0, block), (0, 0))) for x in (x_MI, gradient_MO))
    wide = jnp.promote_types(x_MI.dtype, jnp.float32)

    def body(number: Array, total_EIO: Array) -> Array:
        rows, gradients = (jax.lax.dynamic_slice_in_dim(x, start_B[number], block) for x in (x_MI, gradient_MO))
        gradients = jnp.where(jnp.arange(block)[:, None] < count_B[number], gradients, 0)
        added = jax.lax.dot_general(
            rows, gradients, (((0,), (0,)), ((), ())), precision=_precision(rows.dtype), preferred_element_type=wide
        )
        before = jax.lax.dynamic_index_in_dim(total_EIO, group_B[number], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total_EIO, before + added, group_B[number], axis=0)

    zeros = jnp.zeros((len(sizes_E), x_MI.shape[1], gradient_MO.shape[1]), wide)
    return jax.lax.fori_loop(0, num_blocks, body, zeros)
