"""Sampling: a batch of prompts in, a completion of each out, with a cache of keys and values.

A batch is one compiled program: the prompts are read at once, then a loop adds a token to every row until all rows
have ended. Programs are compiled per model, batch size, prompt bucket (a power of two) and `max_new_tokens`;
temperature, top-p and top-k may change from call to call for free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from kto_jax.config import ConfigError
from kto_jax.devices.sharding import ACTIVATION_RULES, num_parts
from kto_jax.models.model import Model, Params
from kto_jax.shapes import power_of_two

_SMALLEST_BUCKET = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. All three are traced.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_p: draws from the smallest set of most likely tokens whose mass is at least this; 1 draws from all.
      top_k: draws from so many most likely tokens; 0 draws from all. Applied before `top_p`.
    """

    temperature: float | Float[Array, ""] = 1.0
    top_p: float | Float[Array, ""] = 1.0
    top_k: int | Int[Array, ""] = 0


def sample(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray | Sequence[int]],
    *,
    eos_id: int | Sequence[int],
    key: Key[Array, ""],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 16,
) -> list[np.ndarray]:
    """Completes prompts.

    Row i draws from `fold_in(key, i)`: its completion does not depend on the other prompts or on `batch_size`, but for
    rounding. Every process of a run must make the same call.

    Args:
      model: the model.
      params: its parameters, on one device or over a mesh.
      prompts: token ids of each prompt; none may be empty.
      eos_id: the id that ends a completion, or several.
      key: of `jax.random.key`.
      max_new_tokens: a completion that has not ended by then is cut.
      temperature: see `Sampling`, as for the next two.
      top_p: in (0, 1].
      top_k: 0 or more.
      batch_size: prompts completed at once; a short batch is filled up. Over a mesh it is raised to the next
        multiple of data × fsdp.

    Returns:
      int32 ids of each completion, in the order of the prompts; with its EOS, where it ended in one.

    Raises:
      ConfigError: a prompt is empty, holds an id outside of the vocabulary or leaves no room in the model's context
        for `max_new_tokens`; or an argument is out of its range.
    """
    ids = [np.asarray(prompt, np.int32) for prompt in prompts]
    _check_arguments(max_new_tokens, temperature, top_p, top_k, batch_size)
    _check_prompts(model, ids, max_new_tokens)
    mesh_wide = _replicated(params)
    if mesh_wide is not None:
        parts = num_parts(mesh_wide.mesh, ACTIVATION_RULES["rows"])
        batch_size = -(-batch_size // parts) * parts
    eos_ids = np.atleast_1d(np.asarray(eos_id, np.int32))
    sampling = (np.float32(temperature), np.float32(top_p), np.int32(top_k))
    # Alike in length, so that few batches fall into a larger bucket for one long prompt.
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    completions: dict[int, np.ndarray] = {}
    for start in range(0, len(ids), batch_size):
        rows = by_length[start : start + batch_size]
        # Placed by hand: the call also works where implicit transfers are forbidden.
        inputs = _place((*_pad(ids, rows, batch_size), key, eos_ids, sampling), mesh_wide)
        written_BT, num_tokens_B = jax.device_get(
            _complete(model, params, *inputs, max_new_tokens=max_new_tokens, mesh_wide=mesh_wide)
        )
        for row, written_T, num_tokens in zip(rows, written_BT, num_tokens_B, strict=False):
            completions[row] = written_T[:num_tokens].copy()
    return [completions[row] for row in range(len(ids))]


def choose_tokens(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Draws one token of each row.

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
        # Not free beside a small model's step: left out where nothing is cut.
        kept_BV = jax.lax.cond(truncated, lambda: truncate(warm_BV, sampling), lambda: warm_BV)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV)

    chosen = jax.lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1))
    return chosen.astype(jnp.int32)


def truncate(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Sets the logits that top-k and top-p cut off to -inf; `temperature` is not read.

    Top-p looks at the distribution that top-k leaves. Tokens that are exactly as likely as the last one kept are kept
    too, so a tie may keep more than `top_k`.
    """
    kept_BV = jax.lax.cond(
        sampling.top_k > 0,
        lambda: _heaviest(logits_BV, jnp.ones_like(logits_BV), jnp.asarray(sampling.top_k, jnp.float32)),
        lambda: jnp.ones_like(logits_BV, bool),
    )
    left_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    # At top_p = 1 rounding must not cut the tail: the sum may reach 1 early.
    kept_BV = jax.lax.cond(
        sampling.top_p < 1,
        lambda: kept_BV & _heaviest(left_BV, jax.nn.softmax(left_BV, axis=-1), jnp.maximum(sampling.top_p, 1e-30)),
        lambda: kept_BV,
    )
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _heaviest(
    logits_BV: Float[Array, "B V"], weights_BV: Float[Array, "B V"], target: Float[Array, ""]
) -> Bool[Array, "B V"]:
    """The fewest largest logits of each row whose weights sum to at least `target`, or all where none do.

    The smallest logit kept is found bit by bit, 32 sums over the vocabulary: exact, and several times as fast as
    sorting it.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats they stand for.
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def decide(index: Array, smallest_B1: Array) -> Array:
        larger_B1 = smallest_B1 | (sign >> index.astype(jnp.uint32))
        weight_B1 = jnp.sum(jnp.where(order_BV >= larger_B1, weights_BV, 0), axis=-1, keepdims=True)
        return jnp.where(weight_B1 >= target, larger_B1, smallest_B1)

    start_B1 = jnp.zeros((logits_BV.shape[0], 1), jnp.uint32)
    return order_BV >= jax.lax.fori_loop(0, 32, decide, start_B1)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "mesh_wide"))
def _complete(
    model: Model,
    params: Params,
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    rows_B: Int[Array, " B"],
    key: Key[Array, ""],
    eos_ids: Int[Array, " E"],
    sampling: tuple[Array, Array, Array],
    *,
    max_new_tokens: int,
    mesh_wide: NamedSharding | None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Completions, and how many tokens of each count; a row of length 0 fills up the batch and stays empty."""
    batch, length = tokens_BL.shape
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)

    def choose(hidden_BD: Array, num_written: Array, ended_B: Array) -> tuple[Array, Bool[Array, " B"]]:
        now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, num_written)
        tokens_B = choose_tokens(model.logits(params, hidden_BD).astype(jnp.float32), now_B, Sampling(*sampling))
        return tokens_B, ended_B | jnp.any(tokens_B[:, None] == eos_ids[None, :], axis=-1)

    def add_token(state: tuple) -> tuple:
        num_written, tokens_B, ended_B, written_BT, num_tokens_B, cache = state
        position_B = jnp.where(ended_B, -1, lengths_B + num_written - 1)
        hidden_B1D, cache = model.decode(params, cache, tokens_B[:, None], position_B[:, None])
        num_tokens_B = num_tokens_B + ~ended_B
        tokens_B, ended_B = choose(hidden_B1D[:, 0], num_written, ended_B)
        return num_written + 1, tokens_B, ended_B, written_BT.at[:, num_written].set(tokens_B), num_tokens_B, cache

    places_1L = jnp.arange(length)[None, :]
    positions_BL = jnp.where(places_1L < lengths_B[:, None], places_1L, -1)
    # The last token of a completion is never read, so it needs no place in the cache.
    cache = model.init_cache(batch, length + max_new_tokens - 1)
    hidden_BLD, cache = model.decode(params, cache, tokens_BL, positions_BL)
    # One position of each row: the logits are [B, V], never [B, L, V].
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    last_hidden_BD = jnp.take_along_axis(hidden_BLD, last_B11, axis=1)[:, 0]
    absent_B = lengths_B == 0
    tokens_B, ended_B = choose(last_hidden_BD, jnp.zeros((), jnp.int32), absent_B)
    written_BT = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(tokens_B)
    state = (jnp.ones((), jnp.int32), tokens_B, ended_B, written_BT, (~absent_B).astype(jnp.int32), cache)
    state = jax.lax.while_loop(lambda state: (state[0] < max_new_tokens) & ~jnp.all(state[2]), add_token, state)
    completions = state[3], state[4]
    # Every process reads all rows.
    return completions if mesh_wide is None else jax.lax.with_sharding_constraint(completions, mesh_wide)


def _pad(ids: list[np.ndarray], rows: list[int], batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, bucket], lengths [B] and row numbers [B] of a batch; rows that fill it up have length 0."""
    longest = max(len(ids[row]) for row in rows)
    bucket = max(_SMALLEST_BUCKET, power_of_two(longest))
    tokens_BL = np.zeros((batch_size, bucket), np.int32)
    lengths_B, rows_B = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for place, row in enumerate(rows):
        tokens_BL[place, : len(ids[row])] = ids[row]
        lengths_B[place], rows_B[place] = len(ids[row]), row
    return tokens_BL, lengths_B, rows_B


def _replicated(params: Params) -> NamedSharding | None:
    """The sharding that keeps a whole copy on every device of the parameters' mesh; None where there is no mesh."""
    sharding = jax.tree.leaves(params)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def _place(tree: Any, mesh_wide: NamedSharding | None) -> Any:
    """Puts what all processes hold alike on every device."""
    if mesh_wide is None or mesh_wide.is_fully_addressable:
        return jax.device_put(tree, mesh_wide)

    def place(x: Any) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(mesh_wide, np.asarray(x))

    return jax.tree.map(place, tree)


def _check_arguments(max_new_tokens: int, temperature: float, top_p: float, top_k: int, batch_size: int) -> None:
    for name, value, fits, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "an integer of at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (the most likely token) or a positive number"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or a positive integer"),
        ("batch_size", batch_size, batch_size >= 1, "an integer of at least 1"),
    ):
        if not fits:
            raise ConfigError(f"{name}={value} cannot be sampled with; it must be {allowed}. Set {name} so.")


def _check_prompts(model: Model, ids: list[np.ndarray], max_new_tokens: int) -> None:
    vocab_size, context = model.config.vocab_size, model.config.max_length
    for number, prompt in enumerate(ids, start=1):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {number} has no tokens; a prompt needs at least one. Write some text.")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            wrong = next(int(token) for token in prompt if not 0 <= token < vocab_size)
            raise ConfigError(
                f"prompt {number} holds token {wrong}; the model's vocabulary is 0 to {vocab_size - 1}."
                " Use the tokenizer that belongs to the model."
            )
        if len(prompt) + max_new_tokens > context:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens, and max_new_tokens={max_new_tokens} more would exceed the"
                f" model's context of {context}. Shorten the prompt, or set max_new_tokens lower."
            )
