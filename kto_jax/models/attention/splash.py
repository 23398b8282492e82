"""Flash attention over packed rows on TPU: splash attention, the Pallas kernel that comes with JAX.

The kernel skips blocks above the diagonal and outside the window, which are known when it is built. Segments are known
only at run time: they mask scores, but skip no block. The kernel is imported only when a run uses it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.dense import scaled

# Tokens per block, fastest first: the kernel requires multiples of 128.
BLOCKS = (512, 384, 256, 128)


def why_missing() -> str:
    """Why the kernel cannot be imported; empty if it can."""
    try:
        _kernel()
    except ImportError:
        return f"JAX {jax.__version__} does not have it"
    return ""


def why_not(query: Array, *, window: int | None, softcap: float | None, device: Any) -> str:
    """Why the kernel cannot compute this attention on this device: it always can."""
    del query, window, softcap, device
    return ""


@functools.cache
def _kernel() -> ModuleType:
    """JAX's module with the kernel.

    Raises:
      ImportError: this JAX lacks it.
    """
    return importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")


def splash_attention(
    query_RLNH: Float[Array, "R L N H"],
    key_RLKH: Float[Array, "R L K H"],
    value_RLKH: Float[Array, "R L K H"],
    *,
    segment_ids_RL: Int[Array, "R L"],
    positions_RL: Int[Array, "R L"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
    interpret: bool = False,
) -> Float[Array, "R L N H"]:
    """Computes `attention` with the same tokens as queries and keys, if every segment has positions 0, 1, 2, ...

    The kernel knows only a token's index in the row. Inside such a contiguous segment, differences of indices equal
    those of positions; the packer writes no others. Arguments and result are those of `dense_attention`, except:

    Args:
      positions_RL: ignored.
      interpret: runs the kernel without a TPU, for tests.
    """
    del positions_RL
    length, num_heads = query_RLNH.shape[1:3]
    block, padded = block_and_length(length)
    shape = (padded, padded)
    splash = _kernel()
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(*(block,) * 8),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def heads_first(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    segments = jnp.pad(segment_ids_RL, ((0, 0), (0, padded - length)))
    heads = (heads_first(scaled(query_RLNH, scale)), heads_first(key_RLKH), heads_first(value_RLKH))
    mixed = _with_precision(jax.vmap(kernel), precision)(*heads, splash.SegmentIds(segments, segments))
    return mixed.swapaxes(1, 2)[:, :length]


def _with_precision(kernel: Callable[..., Array], precision: jax.lax.Precision | None) -> Callable[..., Array]:
    """The kernel, which has no precision argument, with matmuls of this precision in both passes."""
    if precision is None:
        return kernel
    name = precision.name.lower()

    @jax.custom_vjp
    def run(*arrays):
        with jax.default_matmul_precision(name):
            return kernel(*arrays)

    def forward(*arrays):
        with jax.default_matmul_precision(name):
            return jax.vjp(kernel, *arrays)

    def backward(gradient, mixed_grad):
        with jax.default_matmul_precision(name):
            return gradient(mixed_grad)

    run.defvjp(forward, backward)
    return run


def block_and_length(length: int) -> tuple[int, int]:
    """The largest block that pads a row of this length at most 10 % more than any other, and the padded length."""
    padded = {block: -(-length // block) * block for block in BLOCKS}
    # Large blocks are worth some padding: with blocks of 128, a row has 16 times as many pairs as with blocks of 512.
    block = next(block for block in BLOCKS if padded[block] <= 1.1 * min(padded.values()))
    return block, padded[block]
