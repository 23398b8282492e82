"""Flash attention over packed rows on TPU: splash attention, the Pallas kernel that comes with JAX.

The kernel computes scores in tiles of queries and keys, and reads from the TPU's scalar memory which tiles to compute.
JAX's own schedules know the causal mask and the window, but not the segments. `tile_schedule` derives a schedule from
the segments at run time: each tile of queries reads the tiles of keys from the first that holds a token of one of its
segments to its own. Rows are laid end to end as one sequence, so that one call of the kernel computes all of them. The
kernel is imported only when a run uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.dense import scaled
from kto_jax.models.attention.of_jax import kernels_of_jax, why_jax_lacks

# Tokens per block, fastest first: the kernel requires multiples of 128.
BLOCKS = (512, 384, 256, 128)

_kernel = functools.partial(kernels_of_jax, "tpu.splash_attention")
why_missing = functools.partial(why_jax_lacks, "tpu.splash_attention")
"""Why the kernel cannot be imported; empty if it can."""


def why_not(query: Array, *, window: int | None, softcap: float | None, device: Any) -> str:
    """Why the kernel cannot compute this attention on this device: it always can."""
    del query, window, softcap, device
    return ""


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
    rows, length, num_heads, head_dim = query_RLNH.shape
    block, padded = block_and_length(length)
    starts_RL = segment_starts(jnp.pad(segment_ids_RL, ((0, 0), (0, padded - length))))
    schedule = tile_schedule(starts_RL, block, window)
    splash = _kernel()
    # The schedule of one tile is replaced; what is kept is the function that masks scores inside a tile.
    tile = (block, block)
    mask = splash.CausalMask(tile) if window is None else splash.LocalMask(tile, (window - 1, 0), 0)
    of_one_tile = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(*(block,) * 8),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    info = of_one_tile.fwd_mask_info._replace(q_sequence=jnp.arange(rows * padded, dtype=jnp.int32))
    by_query = info._replace(data_next=schedule.key_tiles, block_mask=schedule.key_tiles_needed)
    by_key = info._replace(data_next=schedule.query_tiles, block_mask=schedule.query_tiles_needed)
    kernel = type(of_one_tile)(by_query, by_query, by_key, **of_one_tile.kwargs)

    def heads_first(x: Array) -> Array:
        whole = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return whole.reshape(rows * padded, x.shape[2], head_dim).swapaxes(0, 1)

    starts = starts_RL.reshape(-1)
    heads = (heads_first(scaled(query_RLNH, scale)), heads_first(key_RLKH), heads_first(value_RLKH))
    mixed = _with_precision(kernel, precision)(*heads, splash.SegmentIds(starts, starts))
    return mixed.swapaxes(0, 1).reshape(rows, padded, num_heads, head_dim)[:, :length]


def segment_starts(segment_ids_RL: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """The index of the first token of every token's segment in the sequence of all rows laid end to end.

    No two segments share it, even of different rows. Every token of padding (segment 0) is given its own index.
    """
    index_RL = jnp.arange(segment_ids_RL.size, dtype=jnp.int32).reshape(segment_ids_RL.shape)
    before_RL = jnp.pad(segment_ids_RL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    is_first_RL = (segment_ids_RL != before_RL) | (segment_ids_RL == 0)
    return jax.lax.cummax(jnp.where(is_first_RL, index_RL, 0), axis=1)


class TileSchedule(NamedTuple):
    """Which tiles of scores the kernel computes, of T tiles of tokens and at most W tiles per tile of tokens.

    Attributes:
      key_tiles: [1, T, W], the tiles of keys that each tile of queries reads, in order; then the last one again.
      key_tiles_needed: [1, T, W], 1 where that tile is computed, else 0.
      query_tiles: [1, W, T], the tiles of queries that read each tile of keys, in order; then the last one again.
      query_tiles_needed: [1, W, T], as `key_tiles_needed`.
    """

    key_tiles: Int[Array, "1 T W"]
    key_tiles_needed: Int[Array, "1 T W"]
    query_tiles: Int[Array, "1 W T"]
    query_tiles_needed: Int[Array, "1 W T"]


def tile_schedule(starts_RL: Int[Array, "R L"], block: int, window: int | None) -> TileSchedule:
    """The tiles that hold a query and a key of the same segment, the key not after the query, and inside the window.

    Args:
      starts_RL: from `segment_starts`.
      block: tokens per tile; divides L.
      window: as for `dense_attention`.
    """
    rows, length = starts_RL.shape
    width, tiles = length // block, rows * length // block
    tile_T = jnp.arange(tiles, dtype=jnp.int32)
    first_key_tile_T = starts_RL.reshape(tiles, block)[:, 0] // block
    if window is not None:
        width = min(width, -(-(window - 1) // block) + 1)
        first_key_tile_T = jnp.maximum(first_key_tile_T, (tile_T * block - (window - 1)) // block)
    # First tiles of keys never decrease, so the tiles of queries that read a tile of keys follow each other.
    last_query_tile_T = jnp.searchsorted(first_key_tile_T, tile_T, side="right").astype(jnp.int32) - 1
    step_1W = jnp.arange(width, dtype=jnp.int32)[None]
    # Scalar memory is small.
    index_dtype = np.min_scalar_type(-tiles)

    def schedule(first_T: Array, last_T: Array) -> tuple[Array, Array]:
        index_TW = first_T[:, None] + step_1W
        needed_TW = index_TW <= last_T[:, None]
        return jnp.minimum(index_TW, last_T[:, None]).astype(index_dtype)[None], needed_TW.astype(jnp.int8)[None]

    key_tiles, key_tiles_needed = schedule(first_key_tile_T, tile_T)
    query_tiles, query_tiles_needed = schedule(tile_T, last_query_tile_T)
    return TileSchedule(key_tiles, key_tiles_needed, query_tiles.swapaxes(1, 2), query_tiles_needed.swapaxes(1, 2))


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
