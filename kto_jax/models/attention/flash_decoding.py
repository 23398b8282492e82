"""Decoding attention on NVIDIA GPUs: flash decoding, the Triton kernel that comes with JAX.

The kernel splits the keys of a slot into parts that different multiprocessors read, and reads no part after the current
token or before its window, where `cached_attention` reads the whole cache. The cache is passed as it is stored.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.of_jax import kernels_of_jax, why_jax_lacks

_MOST_SPLITS, _LARGEST_BLOCK, _SMALLEST_BLOCK = 16, 128, 16
_LARGEST_TILE = 2**14
"""Numbers of keys in a block: one of keys and one of values, in bfloat16, must fit in the 99 KiB of an L40."""

_kernel = functools.partial(kernels_of_jax, "gpu.decode_attention")
why_missing = functools.partial(why_jax_lacks, "gpu.decode_attention")
"""Why the kernel cannot be imported; empty if it can."""


def why_not(
    query: Array, *, window: int | None, softcap: float | None, device: Any, sequences: int, length: int
) -> str:
    """Why the kernel cannot compute this attention on this device; empty if it can. Arguments as for `paged`."""
    del window, sequences, length
    head_dim = query.shape[-1]
    if query.dtype != jnp.bfloat16:
        return f"needs bfloat16, and queries are {query.dtype}"
    if not 16 <= head_dim <= 256 or head_dim & (head_dim - 1):
        return f"needs heads whose width is a power of two from 16 to 256, and these have {head_dim}"
    if softcap is not None:
        return f"has no soft-caps, and this layer has one of {softcap}"
    if float(device.compute_capability) < 8:
        return f"needs compute capability 8.0 or more, and this GPU has {device.compute_capability}"
    return ""


def flash_decoding(
    query_B1NH: Float[Array, "B 1 N H"],
    key_BKSH: Float[Array, "B K S H"],
    value_BKSH: Float[Array, "B K S H"],
    *,
    positions_BL: Int[Array, "B 1"],
    window: int | None = None,
    softcap: None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
    interpret: bool = False,
) -> Float[Array, "B 1 N H"]:
    """Computes `cached_attention` of one new token in each slot.

    The sums of parts are rounded to the dtype of the cache before they are added. Arguments and result are those of
    `cached_attention`, except:

    Args:
      softcap: must be None.
      precision: ignored.
      interpret: runs the kernel without a GPU, for tests.
    """
    del precision
    assert softcap is None, "see `why_not`"
    batch, num_kv_heads, length, head_dim = key_BKSH.shape
    splits, block = splits_and_block(length, head_dim)
    # An idle slot reads one key, so that its value is finite.
    lengths_B = jnp.maximum(positions_BL[:, 0] + 1, 1)
    firsts_B = jnp.zeros_like(lengths_B) if window is None else jnp.maximum(lengths_B - window, 0)
    # Each key/value head of a slot is a sequence with one head of keys.
    sequences = batch * num_kv_heads
    # Normalised here: the kernel would round the normaliser.
    sums, (normalizers, _) = _kernel().mqa(
        query_B1NH.reshape(sequences, -1, head_dim),
        key_BKSH.reshape(sequences, length, head_dim),
        value_BKSH.reshape(sequences, length, head_dim),
        jnp.repeat(firsts_B, num_kv_heads),
        jnp.repeat(lengths_B, num_kv_heads),
        sm_scale=head_dim**-0.5 if scale is None else scale,
        block_k=block,
        k_splits=splits,
        return_residuals=True,
        normalize_output=False,
        interpret=interpret,
    )
    mixed = sums.astype(jnp.float32) / normalizers[..., None]
    return mixed.reshape(query_B1NH.shape).astype(value_BKSH.dtype)


def splits_and_block(length: int, head_dim: int) -> tuple[int, int]:
    """Parts into which a cache is split, and keys of a part that are read at once: a power of two that divides it.

    Args:
      length: positions of the cache, a multiple of 16.
      head_dim: width of a head.
    """
    splits = _MOST_SPLITS
    while length % (splits * _SMALLEST_BLOCK):
        splits //= 2
    part = length // splits
    return splits, min(part & -part, _LARGEST_BLOCK, _LARGEST_TILE // head_dim)
