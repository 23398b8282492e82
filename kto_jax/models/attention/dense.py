"""Dense attention over packed rows and over a KV cache: causal, grouped-query, memory linear in the length.

Every other attention is tested against this one, and decoding uses it. A query attends to a key if both are in the same
segment and the key's place is not after the query's, nor `window` or more before it. In a packed row the place is the
position inside the segment; in a cache it is the slot. If L exceeds the chunk of queries, no [L, L] array exists:
chunks are computed in sequence, and recomputed in the backward pass.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kto_jax.models.config import TransformerConfig
from kto_jax.models.rope import LengthDependent

QUERY_CHUNK = 512


def attention(
    query_RLNH: Float[Array, "R L N H"],
    key_RSKH: Float[Array, "R S K H"],
    value_RSKH: Float[Array, "R S K H"],
    *,
    query_places_RL: Int[Array, "R L"],
    key_places_RS: Int[Array, "R S"],
    query_segments_RL: Int[Array, "R L"],
    key_segments_RS: Int[Array, "R S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
    chunk: int = QUERY_CHUNK,
) -> Float[Array, "R L N H"]:
    """Softmax attention of every query over the keys of its own segment that are not after it.

    Each group of N / K query heads shares a key/value head, which is never repeated in memory. A query without a
    visible key gets a finite, meaningless value (the mean of all values), never NaN.

    Args:
      query_RLNH: queries, rotated.
      key_RSKH: keys, rotated.
      value_RSKH: values.
      query_places_RL: place of every query in its segment.
      key_places_RS: place of every key in its segment.
      query_segments_RL: segment of every query.
      key_segments_RS: segment of every key.
      window: keys whose place is `window` or more before the query's are masked; None masks none.
      softcap: scores become softcap * tanh(score / softcap) before masking; None leaves them.
      scale: factor of the scores; None for head_dim ** -0.5.
      precision: of the two matmuls.
      chunk: queries per chunk; the largest temporary is [R, N, chunk, S].

    Returns:
      The output, in the dtype of `value_RSKH`. Softmax is computed in float32 or wider.
    """
    rows, length, num_heads, head_dim = query_RLNH.shape
    groups = num_heads // key_RSKH.shape[2]
    query_RLKGH = scaled(query_RLNH, scale).reshape(rows, length, -1, groups, head_dim)
    block = partial(
        _attend,
        key=key_RSKH,
        value=value_RSKH,
        key_places=key_places_RS,
        key_segments=key_segments_RS,
        window=window,
        softcap=softcap,
        precision=precision,
    )
    if length <= chunk:
        mixed = block(query_RLKGH, query_places_RL, query_segments_RL)
        return mixed.reshape(query_RLNH.shape)
    num_chunks = -(-length // chunk)

    def split(x: Array) -> Array:
        """[R, L, ...] -> [chunks, R, chunk, ...], with zeros after the end."""
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, num_chunks, chunk, *x.shape[2:]), 1, 0)

    chunks = (split(query_RLKGH), split(query_places_RL), split(query_segments_RL))
    mixed = jax.lax.map(lambda parts: jax.checkpoint(block, prevent_cse=False)(*parts), chunks)
    return jnp.moveaxis(mixed, 0, 1).reshape(rows, num_chunks * chunk, num_heads, head_dim)[:, :length]


def scaled(query: Float[Array, "*B H"], scale: float | None) -> Float[Array, "*B H"]:
    """Queries times the scale, None for head_dim ** -0.5; the scale is not rounded to their dtype first."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return (query.astype(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)).astype(query.dtype)


def dense_attention(
    query_RLNH: Float[Array, "R L N H"],
    key_RLKH: Float[Array, "R L K H"],
    value_RLKH: Float[Array, "R L K H"],
    *,
    segment_ids_RL: Int[Array, "R L"],
    positions_RL: Int[Array, "R L"],
    **options: Any,
) -> Float[Array, "R L N H"]:
    """`attention` over packed rows, whose tokens are the queries and the keys. All kernels have this signature.

    Args:
      query_RLNH: queries, rotated.
      key_RLKH: keys, rotated.
      value_RLKH: values.
      segment_ids_RL: attention stays inside a segment; 0 is padding, whose values are meaningless.
      positions_RL: position of every token in its segment.
      options: `window`, `softcap`, `scale` and `precision`, as in `attention`; here also `chunk`.

    Returns:
      The output, in the dtype of `value_RLKH`. Softmax is computed in float32 or wider.
    """
    return attention(
        query_RLNH, key_RLKH, value_RLKH, query_places_RL=positions_RL, key_places_RS=positions_RL,
        query_segments_RL=segment_ids_RL, key_segments_RS=segment_ids_RL, **options,
    )  # fmt: skip


def _attend(query, query_places, query_segments, *, key, value, key_places, key_segments, window, softcap, precision):
    """One dense block: query [R, Q, K, G, H] over all keys [R, S, K, H]."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("rqkgh,rskh->rkgqs", query, key, precision=precision, preferred_element_type=wide)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distances = query_places[:, :, None] - key_places[:, None, :]
    visible = (query_segments[:, :, None] == key_segments[:, None, :]) & (distances >= 0)
    if window is not None:
        visible &= distances < window
    # A finite floor, not -inf: a query that sees nothing must have a finite value and gradient.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("rkgqs,rskh->rqkgh", shares, value, precision=precision)


def rotary_tables(
    positions_RL: Int[Array, "R L"],
    config: TransformerConfig,
    dtype,
    *,
    local: bool = False,
    lengths_RL: Int[Array, "R L"] | None = None,
) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, [R, L, 1, rotated / 2] each, in `dtype` (float32 or wider).

    Args:
      positions_RL: position of every token in its sequence.
      config: the architecture.
      dtype: of the tables.
      local: whether they are those of local layers.
      lengths_RL: length of every token's sequence, for a scaling that depends on it; None if none exceeds the scaling's
        original context.
    """
    scaling = config.rope_scaling if not local or config.local_rope_theta is None else None
    frequencies = jnp.asarray(rotary_frequencies(config, local=local), dtype)[None, None, None, :]
    if lengths_RL is not None and isinstance(scaling, LengthDependent):
        plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
        frequencies = scaling.long_frequencies(plain, lengths_RL.astype(dtype)[..., None, None])
    angles = positions_RL.astype(dtype)[..., None, None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    tables = jnp.cos(angles), jnp.sin(angles)
    return tables if factor == 1 else (tables[0] * factor, tables[1] * factor)


def sequence_lengths(positions_RL: Int[Array, "R L"], segment_ids_RL: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """The length of every token's sequence."""
    num_segments = positions_RL.shape[1] + 1

    def one(positions_L: Array, segments_L: Array) -> Array:
        return jax.ops.segment_max(positions_L, segments_L, num_segments)[segments_L] + 1

    return jax.vmap(one)(positions_RL, segment_ids_RL)


def rotate(x_RLNH: Float[Array, "R L N H"], tables: tuple[Array, Array]) -> Float[Array, "R L N H"]:
    """Rotates pairs of every head by their angle, in the tables' dtype.

    The pairs are (i, i + W/2) of the first W entries, where W is twice the tables' width; the others stay as they are.
    """
    cos, sin = tables
    width = 2 * cos.shape[-1]
    left, right = jnp.split(x_RLNH[..., :width].astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_RLNH.dtype)
    return rotated if width == x_RLNH.shape[-1] else jnp.concatenate([rotated, x_RLNH[..., width:]], axis=-1)


def rotary_frequencies(config: TransformerConfig, *, local: bool = False) -> np.ndarray:
    """Radians per position of every rotated pair of a head, float64; `local` for local layers' own.

    Those of a scaling that depends on the length are for sequences within its original context.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    size = config.head_dim if config.rotary_dim is None else config.rotary_dim
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    return frequencies if scaling is None else scaling.scale_frequencies(frequencies)
