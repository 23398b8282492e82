"""Blockwise attention over packed rows: it computes only the blocks that are not fully masked.

Rows are split into blocks of tokens. Each block of queries loops over its key blocks, from the first to the last that
holds a visible key, with an online softmax (arXiv 2112.05682, 2205.14135): only one block of scores exists at a time.
The first and last blocks are computed from segments and positions at run time, so a row of many short segments takes a
fraction of the matmuls of one long segment. The backward pass visits the same pairs of blocks and recomputes the
attention weights from each query's log-sum-exp. Pure XLA: it runs everywhere.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.dense import dense_attention, scaled

# Measured on CPU: 32 and 64 take up to 20 % longer on long rows, and 128 takes 50 % longer in the backward pass.
BLOCK = 48


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options that are static within a program."""

    window: int | None
    softcap: float | None
    precision: jax.lax.Precision | None


class _Tokens(NamedTuple):
    """Segments and positions of each block's tokens, the first key block that it may see, and the last plus one."""

    segments: Array
    places: Array
    starts: Array
    stops: Array


def blockwise_attention(
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
    block: int = BLOCK,
) -> Float[Array, "R L N H"]:
    """Computes `attention` with the same tokens as queries and keys, in memory linear in the length.

    Tokens may be in any order. If each segment is contiguous with rising positions, as the packer writes it, later
    blocks are skipped. Arguments and result are those of `dense_attention`, except:

    Args:
      segment_ids_RL: padding, 0, sees nothing and gets zeros, except in rows of one block, where its values are
        meaningless.
      block: tokens per block; a row of at most one block uses dense attention.
    """
    rows, length, num_heads, head_dim = query_RLNH.shape
    if length <= block:
        return dense_attention(
            query_RLNH, key_RLKH, value_RLKH, segment_ids_RL=segment_ids_RL, positions_RL=positions_RL, window=window,
            softcap=softcap, scale=scale, precision=precision,
        )  # fmt: skip
    kv_heads = key_RLKH.shape[2]
    num_blocks = -(-length // block)

    def split(x: Array) -> Array:
        """[R, L, ...] -> [R, blocks, block, ...], with zeros after the end."""
        x = jnp.pad(x, [(0, 0), (0, num_blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, num_blocks, block, *x.shape[2:])

    def split_heads(x: Array) -> Array:
        """[R, L, K * G, H] -> [R * blocks, K, G * block, H]: query heads that share keys are rows of one matmul."""
        x = split(x).reshape(rows * num_blocks, block, kv_heads, -1, head_dim)
        return x.transpose(0, 2, 3, 1, 4).reshape(rows * num_blocks, kv_heads, -1, head_dim)

    segments, places = split(segment_ids_RL), split(positions_RL)
    starts, stops = _bounds(segments, places, window)
    flat = lambda x: x.reshape(rows * num_blocks, *x.shape[2:])  # noqa: E731
    tokens = _Tokens(flat(segments), flat(places), flat(starts), flat(stops))
    options = _Options(window, softcap, precision)
    heads = (split_heads(x) for x in (scaled(query_RLNH, scale), key_RLKH, value_RLKH))
    mixed = _mix(options, *heads, tokens)
    mixed = mixed.reshape(rows, num_blocks, kv_heads, num_heads // kv_heads, block, head_dim)
    return mixed.transpose(0, 1, 4, 2, 3, 5).reshape(rows, num_blocks * block, num_heads, head_dim)[:, :length]


def _bounds(segments_RTB: Array, places_RTB: Array, window: int | None) -> tuple[Array, Array]:
    """For each block of queries the first block of keys that it may see, and the last plus one: [R, T] each.

    Block numbers continue from row to row. The range may include blocks that are not seen, but misses none that is.
    """
    rows, num_blocks, block = segments_RTB.shape
    largest = jnp.iinfo(segments_RTB.dtype).max
    real = segments_RTB > 0
    first, last = jnp.min(jnp.where(real, segments_RTB, largest), -1), jnp.max(segments_RTB, -1)
    early, late = jnp.min(jnp.where(real, places_RTB, largest), -1), jnp.max(jnp.where(real, places_RTB, -1), -1)
    queries, keys = (slice(None), slice(None), None), (slice(None), None)
    seen = (first[queries] <= last[keys]) & (first[keys] <= last[queries]) & (early[keys] <= late[queries])
    query, key = jnp.arange(num_blocks)[:, None], jnp.arange(num_blocks)[None, :]
    nearby = key <= query
    if window is not None:
        seen &= early[queries] - late[keys] < window
        nearby &= (key + 1) * block > query * block - window + 1
    seen &= nearby[None] | ~_in_order(segments_RTB.reshape(rows, -1), places_RTB.reshape(rows, -1))[:, None, None]
    is_seen = seen.any(-1)
    starts = jnp.argmax(seen, -1)
    stops = jnp.where(is_seen, num_blocks - jnp.argmax(seen[..., ::-1], -1), starts)
    offsets = num_blocks * jnp.arange(rows)[:, None]
    return (starts + offsets).astype(jnp.int32), (stops + offsets).astype(jnp.int32)


def _in_order(segments_RL: Array, places_RL: Array) -> Array:
    """Whether each row's segments are contiguous with rising numbers and positions; padding may follow any of them."""
    before = jax.lax.cummax(segments_RL, axis=1)[:, :-1]
    after = segments_RL[:, 1:]
    goes_on = (segments_RL[:, :-1] == after) & (places_RL[:, :-1] < places_RL[:, 1:])
    return jnp.all((after == 0) | (after > before) | ((after == before) & goes_on), axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(options: _Options, query: Array, key: Array, value: Array, tokens: _Tokens) -> Array:
    """Attention [T, K, GB, H] of scaled queries [T, K, GB, H] over keys and values [T, K, B, H]."""
    return _forward(options, query, key, value, tokens)[0]


def _forward(options, query, key, value, tokens):
    """The output, and the residual that the backward pass needs besides the arguments: each query's log-sum-exp."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    floor = jnp.finfo(wide).min
    product = partial(jnp.einsum, precision=options.precision, preferred_element_type=wide)

    def one_block(_, block):
        query, tokens_q = block

        def one_pair(index, carry):
            top, total, mixed = carry
            scores, visible, _ = _scores(options, query, key[index], tokens_q, tokens, index)
            new_top = jnp.maximum(top, jnp.max(jnp.where(visible, scores, floor), axis=-1))
            shares = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0).reshape(*query.shape[:2], -1)
            fade = jnp.exp(top - new_top)
            total = total * fade + jnp.sum(shares, axis=-1).reshape(total.shape)
            added = product("kqs,ksh->kqh", shares.astype(value.dtype), value[index])
            return new_top, total, mixed * fade.reshape(*query.shape[:2], 1) + added

        per_query = (query.shape[0], -1, tokens.segments.shape[1])
        empty = jnp.zeros(query.shape[:2], wide).reshape(per_query)
        carry = (empty + floor, empty, jnp.zeros(query.shape, wide))
        top, total, mixed = jax.lax.fori_loop(tokens_q.starts, tokens_q.stops, one_pair, carry)
        # A query that sees nothing has a sum of 0: its output is 0, and its weights stay 0 in the backward pass.
        total = jnp.where(total == 0, 1, total)
        mixed = mixed / total.reshape(*query.shape[:2], 1)
        return None, (mixed.astype(value.dtype), top + jnp.log(total))

    return jax.lax.scan(one_block, None, (query, tokens))[1]


def _scores(options, query, key, tokens_q, tokens, index):
    """Scores [K, G, B, B] of a pair of blocks, their mask, and the derivative of the soft-cap."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("kqh,ksh->kqs", query, key, precision=options.precision, preferred_element_type=wide)
    scores = scores.reshape(query.shape[0], -1, tokens_q.segments.shape[0], key.shape[1])
    slope = None
    if options.softcap is not None:
        bent = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * bent, 1 - jnp.square(bent)
    segments_q = tokens_q.segments[:, None]
    distances = tokens_q.places[:, None] - tokens.places[index][None, :]
    visible = (segments_q == tokens.segments[index][None, :]) & (segments_q > 0) & (distances >= 0)
    if options.window is not None:
        visible &= distances < options.window
    return scores, visible[None, None], slope


def _mix_forward(options, query, key, value, tokens):
    mixed, log_sums = _forward(options, query, key, value, tokens)
    return mixed, (query, key, value, tokens, mixed, log_sums)


def _mix_backward(options, kept, mixed_grad):
    query, key, value, tokens, mixed, log_sums = kept
    wide = log_sums.dtype
    product = partial(jnp.einsum, precision=options.precision, preferred_element_type=wide)
    # The term that the softmax's gradient subtracts: the weighted mean of the weights' gradients.
    means = jnp.sum(mixed.astype(wide) * mixed_grad.astype(wide), axis=-1).reshape(log_sums.shape)

    def one_block(sums, block):
        query, grad, log_sums, means, tokens_q = block

        def one_pair(index, carry):
            query_grad, key_grads, value_grads = carry
            scores, visible, slope = _scores(options, query, key[index], tokens_q, tokens, index)
            shares = jnp.where(visible, jnp.exp(scores - log_sums[..., None]), 0)
            share_grads = product("kqh,ksh->kqs", grad, value[index]).reshape(shares.shape)
            score_grads = shares * (share_grads - means[..., None])
            if slope is not None:
                score_grads = score_grads * slope
            flat = lambda x: x.reshape(*query.shape[:2], -1).astype(query.dtype)  # noqa: E731
            value_grads = value_grads.at[index].add(product("kqs,kqh->ksh", flat(shares), grad))
            key_grads = key_grads.at[index].add(product("kqs,kqh->ksh", flat(score_grads), query))
            return query_grad + product("kqs,ksh->kqh", flat(score_grads), key[index]), key_grads, value_grads

        carry = (jnp.zeros(query.shape, wide), *sums)
        query_grad, *sums = jax.lax.fori_loop(tokens_q.starts, tokens_q.stops, one_pair, carry)
        return tuple(sums), query_grad.astype(query.dtype)

    sums = (jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide))
    blocks = (query, mixed_grad, log_sums, means, tokens)
    (key_grads, value_grads), query_grads = jax.lax.scan(one_block, sums, blocks)
    return query_grads, key_grads.astype(key.dtype), value_grads.astype(value.dtype), None


_mix.defvjp(_mix_forward, _mix_backward)
