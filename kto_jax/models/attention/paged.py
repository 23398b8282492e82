"""Decoding attention on TPU: paged attention, the Pallas kernel that comes with JAX.

The kernel reads the pages of keys and values that a completion has filled, where `cached_attention` reads the whole
cache. kto_jax's cache is not paged: each slot has a contiguous part of it. Cut into pages and with the heads of a slot
as sequences of their own, that part is what the kernel takes, so nothing is copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.dense import scaled
from kto_jax.models.attention.of_jax import kernels_of_jax, why_jax_lacks

LARGEST_PAGE = 512
"""Cache positions that the kernel reads at once, at most: 128 KiB of keys in bfloat16 with heads of 128."""
_MOST_PAGES = 2**17
"""Pages of all slots and heads of a device: the scalar memory that lists them holds 1 MiB."""
_TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")

_kernel = functools.partial(kernels_of_jax, "tpu.paged_attention")
why_missing = functools.partial(why_jax_lacks, "tpu.paged_attention")
"""Why the kernel cannot be imported; empty if it can."""


def why_not(
    query: Array, *, window: int | None, softcap: float | None, device: Any, sequences: int, length: int
) -> str:
    """Why the kernel cannot compute this attention on this device; empty if it can.

    Args:
      query: one new token of every slot.
      window: of the layer.
      softcap: of the layer.
      device: the device.
      sequences: slots times key/value heads of a device.
      length: positions of the cache.
    """
    del softcap
    if query.dtype != jnp.bfloat16:
        return f"needs bfloat16, and queries are {query.dtype}"
    if query.shape[-1] % 128:
        return f"needs heads whose width is a multiple of 128, and these have {query.shape[-1]}"
    if window is not None:
        return f"has no windows, and this layer has one of {window}"
    if sequences * length > _MOST_PAGES * page_size(length):
        return f"lists at most {_MOST_PAGES} pages, and {sequences} slots × heads of {length} positions have more"
    if device.device_kind in _TWO_CORES:
        return f"computes on one core, and a {device.device_kind} has two"
    return ""


def paged_attention(
    query_B1NH: Float[Array, "B 1 N H"],
    key_BKSH: Float[Array, "B K S H"],
    value_BKSH: Float[Array, "B K S H"],
    *,
    positions_BL: Int[Array, "B 1"],
    window: None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "B 1 N H"]:
    """Computes `cached_attention` of one new token in each slot.

    The kernel rounds keys and values to bfloat16. Arguments and result are those of `cached_attention`, except:

    Args:
      window: must be None.
      precision: ignored.
    """
    del precision
    assert window is None, "see `why_not`"
    batch, num_kv_heads, length, head_dim = key_BKSH.shape
    page, sequences = page_size(length), batch * num_kv_heads
    pages = length // page
    # An idle slot reads one key: what the kernel leaves for a sequence without keys need not be finite.
    lengths_B = jnp.clip(positions_BL[:, 0] + 1, 1, length)
    mixed = _kernel().paged_attention(
        # In float32, in which the kernel multiplies: it keeps its sums in the queries' dtype.
        scaled(query_B1NH.astype(jnp.float32), scale).reshape(sequences, -1, head_dim),
        key_BKSH.reshape(1, sequences * pages, page, head_dim),
        value_BKSH.reshape(1, sequences * pages, page, head_dim),
        jnp.repeat(lengths_B, num_kv_heads),
        jnp.arange(sequences * pages, dtype=jnp.int32).reshape(sequences, pages),
        attn_logits_soft_cap=softcap,
        pages_per_compute_block=1,
    )
    return mixed.reshape(query_B1NH.shape).astype(value_BKSH.dtype)


def page_size(length: int) -> int:
    """The largest power of two that divides a cache's length, at most `LARGEST_PAGE`."""
    return min(length & -length, LARGEST_PAGE)
