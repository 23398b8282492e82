"""Attention of a few new tokens over a KV cache, whose layout makes every product a plain batched matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.dense import scaled

CACHE_UNIT = 128
"""Kernels of decoding read a cache whose length is a multiple of this; on accelerators all lengths are."""


def cached_attention(
    query_BLNH: Float[Array, "B L N H"],
    key_BKSH: Float[Array, "B K S H"],
    value_BKSH: Float[Array, "B K S H"],
    *,
    positions_BL: Int[Array, "B L"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "B L N H"]:
    """Softmax attention of every query over the slots of its row up to its own position.

    Each group of N / K query heads shares a key/value head, which is never repeated in memory. The largest temporary is
    [B, N, L, S].

    Args:
      query_BLNH: queries, rotated.
      key_BKSH: cached keys, rotated; slot s holds position s.
      value_BKSH: cached values.
      positions_BL: position of every query; a query at -1 gets a finite, meaningless value.
      window: keys `window` or more positions before the query are masked; None masks none.
      softcap: scores become softcap * tanh(score / softcap) before masking; None leaves them.
      scale: factor of the scores; None for head_dim ** -0.5.
      precision: of the two matmuls.

    Returns:
      The output, in the dtype of `value_BKSH`. Softmax is computed in float32 or wider.
    """
    batch, length, _, head_dim = query_BLNH.shape
    num_kv_heads, num_slots = key_BKSH.shape[1:3]
    wide = jnp.promote_types(query_BLNH.dtype, jnp.float32)
    query_BLKGH = scaled(query_BLNH, scale).reshape(batch, length, num_kv_heads, -1, head_dim)
    query_BKQH = jnp.moveaxis(query_BLKGH, 1, 2).reshape(batch, num_kv_heads, -1, head_dim)
    per_head = ((0, 1), (0, 1))
    # dot_general, not einsum, which would transpose the cache before every product on CPU.
    scores = jax.lax.dot_general(
        query_BKQH, key_BKSH, (((3,), (3,)), per_head), precision=precision, preferred_element_type=wide
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distances_BLS = positions_BL[:, :, None] - jnp.arange(num_slots)[None, None, :]
    visible_BLS = distances_BLS >= 0
    if window is not None:
        visible_BLS &= distances_BLS < window
    scores = scores.reshape(batch, num_kv_heads, length, -1, num_slots)
    # A finite floor, not -inf: a query that sees nothing must have a finite value.
    scores = jnp.where(visible_BLS[:, None, :, None, :], scores, jnp.finfo(wide).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value_BKSH.dtype).reshape(batch, num_kv_heads, -1, num_slots)
    mixed_BKQH = jax.lax.dot_general(shares, value_BKSH, (((3,), (2,)), per_head), precision=precision)
    mixed_BKLGH = mixed_BKQH.reshape(batch, num_kv_heads, length, -1, head_dim)
    return jnp.moveaxis(mixed_BKLGH, 2, 1).reshape(query_BLNH.shape)
