"""Attention over packed rows on NVIDIA GPUs: JAX's own Pallas kernel, which it compiles through Triton."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
from jaxtyping import Array, Float, Int

BLOCK = 128


def triton_attention(
    query_RLNH: Float[Array, "R L N H"],
    key_RLKH: Float[Array, "R L K H"],
    value_RLKH: Float[Array, "R L K H"],
    *,
    segment_ids_RL: Int[Array, "R L"],
    positions_RL: Int[Array, "R L"],
    scale: float | None = None,
    interpret: bool = False,
) -> Float[Array, "R L N H"]:
    """As `attention` of the same tokens as queries and keys, where the positions of every segment rise along the row.

    The kernel knows neither windows nor soft-caps, nor heads that share keys, which are therefore repeated. On a GPU
    its products are not those of float32: it is for bfloat16.

    Args:
      query_RLNH: queries, rotated.
      key_RLKH: keys, rotated.
      value_RLKH: values.
      segment_ids_RL: attention stays inside a segment; 0 is padding, whose values mean nothing.
      positions_RL: not read.
      scale: what the products of queries and keys are multiplied by; None for head_dim ** -0.5.
      interpret: runs the kernel without a GPU, to test it.

    Returns:
      The mixed values, in the dtype of `value_RLKH`.
    """
    del positions_RL
    length, num_heads, head_dim = query_RLNH.shape[1:]
    padding = -length % BLOCK

    def padded(x: Array) -> Array:
        # In float32, so that the gradients of heads that share keys are summed so.
        repeated = jnp.repeat(x.astype(jnp.float32), num_heads // x.shape[2], axis=2).astype(x.dtype)
        return jnp.pad(repeated, ((0, 0), (0, padding), (0, 0), (0, 0)))

    mixed = mha(
        padded(query_RLNH),
        padded(key_RLKH),
        padded(value_RLKH),
        jnp.pad(segment_ids_RL, ((0, 0), (0, padding))),
        sm_scale=head_dim**-0.5 if scale is None else scale,
        causal=True,
        block_sizes=_block_sizes(head_dim),
        interpret=interpret,
    )
    return mixed[:, :length]


def _block_sizes(head_dim: int) -> BlockSizes:
    """JAX's own, but of wide heads smaller ones: a block of keys and one of values must fit a core's own memory."""
    sizes = BlockSizes.get_default()
    return sizes if head_dim <= 128 else dataclasses.replace(sizes, block_q=BLOCK // 2, block_k=BLOCK // 2)
