"""Choosing the next token of each row from its logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Other values do not compile another program.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy decoding).
      top_p: nucleus sampling: draw from the smallest set of most likely tokens whose probability is at least this; 1
        draws from all.
      top_k: draw from this many most likely tokens; 0 draws from all. Applied before `top_p`.
      max_new_tokens: a completion that has not ended by then is cut.
    """

    temperature: float | np.floating | Float[Array, ""] = 1.0
    top_p: float | np.floating | Float[Array, ""] = 1.0
    top_k: int | np.integer | Int[Array, ""] = 0
    max_new_tokens: int | np.integer | Int[Array, ""] = 128


def choose_tokens(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Draws one token per row.

    Args:
      logits_BV: float32.
      keys_B: one key per row.
      sampling: how.

    Returns:
      Token ids.
    """

    def draw() -> Array:
        warm_BV = logits_BV / sampling.temperature
        truncated = (sampling.top_p < 1) | (sampling.top_k > 0)
        # Noticeable beside a small model's step, so it is skipped if nothing is cut.
        kept_BV = jax.lax.cond(truncated, lambda: truncate(warm_BV, sampling), lambda: warm_BV)
        return _draw(jnp.exp(kept_BV - jnp.max(kept_BV, axis=-1, keepdims=True)), keys_B)

    chosen = jax.lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1))
    return chosen.astype(jnp.int32)


def _draw(weights_BV: Float[Array, "B V"], keys_B: Key[Array, " B"]) -> Int[Array, " B"]:
    """Draws one token per row in proportion to the weights: first a block of tokens, then a token of the block.

    This takes two random numbers a row. Gumbel noise takes one for every token of the vocabulary, which on CPU is a
    tenth of a small model's step.
    """
    batch, vocabulary = weights_BV.shape
    weights_BGN = jnp.pad(weights_BV, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(batch, -1, _BLOCK)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _pick(jnp.sum(weights_BGN, axis=-1), uniform_B2[:, 0])
    weights_BN = jnp.take_along_axis(weights_BGN, block_B[:, None, None], axis=1)[:, 0]
    return block_B * _BLOCK + _pick(weights_BN, uniform_B2[:, 1])


def _pick(weights_BN: Float[Array, "B N"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """For each row, the index at which the sum of its weights passes its share of their total; never of weight 0."""
    sums_BN = jnp.where(weights_BN > 0, jnp.cumsum(weights_BN, axis=-1), 0)
    # The largest sum, not the last: sums may fall by rounding. No share reaches it, so one index always qualifies.
    share_B1 = uniform_B[:, None] * jnp.max(sums_BN, axis=-1, keepdims=True)
    return jnp.argmax(sums_BN > share_B1, axis=-1)


def truncate(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Sets the logits that top-k and top-p cut off to -inf; `temperature` is not used.

    Top-p applies to the distribution that top-k leaves. Tokens exactly as likely as the last one kept are kept too, so
    a tie may keep more than `top_k`.
    """
    kept_BV = jax.lax.cond(
        sampling.top_k > 0,
        lambda: _heaviest(logits_BV, jnp.ones_like(logits_BV), jnp.asarray(sampling.top_k, jnp.float32)),
        lambda: jnp.ones_like(logits_BV, bool),
    )
    left_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    # At top_p = 1 the sum may reach 1 early by rounding, which must not cut the tail.
    kept_BV = jax.lax.cond(
        sampling.top_p < 1,
        lambda: kept_BV & _heaviest(left_BV, jax.nn.softmax(left_BV, axis=-1), jnp.maximum(sampling.top_p, 1e-30)),
        lambda: kept_BV,
    )
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _heaviest(
    logits_BV: Float[Array, "B V"], weights_BV: Float[Array, "B V"], target: Float[Array, ""]
) -> Bool[Array, "B V"]:
    """The fewest largest logits of each row whose weights sum to at least `target`, or all if the sum stays below.

    The smallest logit kept is found bit by bit, with 32 sums over the vocabulary: exact, and several times as fast as a
    sort.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats that they represent.
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def decide(index: Array, smallest_B1: Array) -> Array:
        larger_B1 = smallest_B1 | (sign >> index.astype(jnp.uint32))
        weight_B1 = jnp.sum(jnp.where(order_BV >= larger_B1, weights_BV, 0), axis=-1, keepdims=True)
        return jnp.where(weight_B1 >= target, larger_B1, smallest_B1)

    start_B1 = jnp.zeros((logits_BV.shape[0], 1), jnp.uint32)
    return order_BV >= jax.lax.fori_loop(0, 32, decide, start_B1)
