"""Sampling completions of token ids, with a KV cache.

A batch is one compiled program: a forward pass over the prompts fills the cache, then a loop adds a token to every row
until all rows have ended. Programs are compiled per model, batch size, prompt bucket (a power of two) and
`max_new_tokens`; temperature, top-p and top-k may change from call to call without compiling again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from kto_jax.config import ConfigError
from kto_jax.devices.sharding import ACTIVATION_RULES, num_parts
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model, Params
from kto_jax.shapes import power_of_two

_SMALLEST_BUCKET = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `max_new_tokens` is compiled into the program; the others are traced.

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
    max_new_tokens: int = dataclasses.field(default=128, metadata={"static": True})


def sample(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray | Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int | Sequence[int],
    key: Key[Array, ""],
    batch_size: int = 16,
    on_batch: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """Completes prompts.

    Row i draws from `fold_in(key, i)`, so its completion does not depend on the other prompts or on `batch_size`,
    except for rounding. Every process of a run must make the same call.

    Args:
      model: the model.
      params: its parameters, on one device or over a mesh.
      prompts: token ids of each prompt; none may be empty.
      sampling: how completions are drawn.
      eos_id: the id that ends a completion, or several.
      key: from `jax.random.key`.
      batch_size: prompts completed at once; a short batch is padded. Over a mesh it is raised to the next multiple of
        data × fsdp.
      on_batch: called after each batch with the number of its prompts.

    Returns:
      int32 ids of each completion, in the order of the prompts, including the EOS if it ended in one.

    Raises:
      ConfigError: as `check_sampling` and `check_prompts`.
    """
    ids = [np.asarray(prompt, np.int32) for prompt in prompts]
    check_sampling(sampling, batch_size)
    check_prompts(model.config, ids, sampling.max_new_tokens)
    mesh_wide = _replicated(params)
    if mesh_wide is not None:
        parts = num_parts(mesh_wide.mesh, ACTIVATION_RULES["rows"])
        batch_size = -(-batch_size // parts) * parts
    eos_ids = np.atleast_1d(np.asarray(eos_id, np.int32))
    traced = Sampling(
        np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.top_k), sampling.max_new_tokens
    )
    # Similar lengths together, so that one long prompt moves few batches to a larger bucket.
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    completions: dict[int, np.ndarray] = {}
    for start in range(0, len(ids), batch_size):
        rows = by_length[start : start + batch_size]
        # Placed explicitly, so that the call also works if implicit transfers are disallowed.
        inputs = _place((*_pad(ids, rows, batch_size), key, eos_ids, traced), mesh_wide)
        written_BT, num_tokens_B = jax.device_get(_complete(model, params, *inputs, mesh_wide=mesh_wide))
        for row, written_T, num_tokens in zip(rows, written_BT, num_tokens_B, strict=False):
            completions[row] = written_T[:num_tokens].copy()
        if on_batch:
            on_batch(len(rows))
    return [completions[row] for row in range(len(ids))]


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
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV)

    chosen = jax.lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1))
    return chosen.astype(jnp.int32)


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


@partial(jax.jit, static_argnames=("model", "mesh_wide"))
def _complete(
    model: Model,
    params: Params,
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    rows_B: Int[Array, " B"],
    key: Key[Array, ""],
    eos_ids: Int[Array, " E"],
    sampling: Sampling,
    *,
    mesh_wide: NamedSharding | None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Completions and their numbers of tokens; a row of length 0 pads the batch and stays empty."""
    batch, length = tokens_BL.shape
    max_new_tokens = sampling.max_new_tokens
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)

    def choose(hidden_BD: Array, num_written: Array, ended_B: Array) -> tuple[Array, Bool[Array, " B"]]:
        now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, num_written)
        tokens_B = choose_tokens(model.logits(params, hidden_BD).astype(jnp.float32), now_B, sampling)
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
    # The last token of a completion is never fed back, so it needs no place in the cache.
    cache = model.init_cache(batch, length + max_new_tokens - 1)
    hidden_BLD, cache = model.decode(params, cache, tokens_BL, positions_BL)
    # One position per row: the logits are [B, V], never [B, L, V].
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
    """Tokens [B, bucket], lengths [B] and row numbers [B] of a batch; rows of padding have length 0."""
    longest = max(len(ids[row]) for row in rows)
    bucket = max(_SMALLEST_BUCKET, power_of_two(longest))
    tokens_BL = np.zeros((batch_size, bucket), np.int32)
    lengths_B, rows_B = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for place, row in enumerate(rows):
        tokens_BL[place, : len(ids[row])] = ids[row]
        lengths_B[place], rows_B[place] = len(ids[row]), row
    return tokens_BL, lengths_B, rows_B


def _replicated(params: Params) -> NamedSharding | None:
    """The sharding that replicates over the mesh of the parameters; None if they are on no mesh."""
    sharding = jax.tree.leaves(params)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def _place(tree: Any, mesh_wide: NamedSharding | None) -> Any:
    """Replicates values that are equal on all processes."""
    if mesh_wide is None or mesh_wide.is_fully_addressable:
        return jax.device_put(tree, mesh_wide)

    def place(x: Any) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(mesh_wide, np.asarray(x))

    return jax.tree.map(place, tree)


def check_sampling(sampling: Sampling, batch_size: int = 1) -> None:
    """Checks the ranges of the arguments of `sample`.

    Raises:
      ConfigError: names the argument, and what is allowed.
    """
    max_new_tokens, temperature = sampling.max_new_tokens, sampling.temperature
    top_p, top_k = sampling.top_p, sampling.top_k
    for name, value, fits, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "an integer of at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (the most likely token) or a positive number"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or a positive integer"),
        ("batch_size", batch_size, batch_size >= 1, "an integer of at least 1"),
    ):
        if not fits:
            raise ConfigError(f"{name}={value} cannot be used for sampling. Allowed: {allowed}. Set {name}.")


def check_prompts(config: TransformerConfig, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
    """Checks that a model can complete prompts of token ids.

    Raises:
      ConfigError: a prompt is empty, has an id outside the vocabulary, or leaves no room in the model's context for
        `max_new_tokens`.
    """
    vocab_size, context = config.vocab_size, config.max_length
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {number} has no tokens. A prompt needs at least one. Write some text.")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            wrong = next(int(token) for token in prompt if not 0 <= token < vocab_size)
            raise ConfigError(
                f"prompt {number} has the token {wrong}. The model's vocabulary is 0 to {vocab_size - 1}. Use the "
                "tokenizer that belongs to the model."
            )
        if len(prompt) + max_new_tokens > context:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens, and max_new_tokens={max_new_tokens} more would exceed the "
                f"model's context of {context}. Shorten the prompt, or set max_new_tokens lower."
            )
