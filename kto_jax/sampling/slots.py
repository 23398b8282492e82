"""Continuous batching on the device: slots that each hold one completion, and three compiled programs.

    prefill   a chunk of prompts                      -> the prefix cache, of a few rows
    insert    rows of the prefix cache                -> slots
    decode    steps for all slots until one has ended -> tokens and log-probabilities for the host

The host refills the slots that have ended while the others keep their caches. A prompt is prefilled without its last
token, which is the first one that its slot decodes; a prompt that several slots need is prefilled once. Programs are
compiled per model, number of slots and cache length, which doubles when a completion needs more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Array, Int, Key

from kto_jax.models.attention.cached import CACHE_UNIT
from kto_jax.models.model import Model, Params
from kto_jax.models.transformer import CACHE_AXES, Cache
from kto_jax.sampling.choose import Sampling, choose_tokens
from kto_jax.shapes import power_of_two

_MAX_STEPS = 32
"""Decoding steps of a call."""
# Rows and tokens of a prefill, and positions of the shortest cache. A CPU is busy with few tokens, and reads the whole
# cache at a cost; an accelerator needs more tokens to be busy, and compiles longer.
_ON_CPU = (4, 32, 128)
_ON_ACCELERATOR = (8, 128, 256)
PREFIX_ROWS = _ON_ACCELERATOR[0]
"""Prompts that an accelerator prefills at once, and keeps the cache of."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """The state of B slots on the device.

    Attributes:
      cache: keys and values of all tokens before the current one.
      tokens_B: the current token, not yet in the cache.
      positions_B: its position; -1 if the slot is idle.
      counts_B: tokens drawn for the completion so far.
      rows_B: number of the completion, from which its random keys are derived.
    """

    cache: Cache
    tokens_B: Int[Array, " B"]
    positions_B: Int[Array, " B"]
    counts_B: Int[Array, " B"]
    rows_B: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion to be drawn.

    Attributes:
      row: its number.
      prompt: int32 token ids, at least one.
    """

    row: int
    prompt: np.ndarray


@dataclasses.dataclass(frozen=True)
class Steps:
    """What decoding steps drew, on the host; slots that ended early leave the rest of their column unused.

    Attributes:
      tokens_KB: token ids.
      logps_KB: their log-probabilities in nats.
      counts_B: tokens drawn for each slot's completion since it began.
      active_B: which slots have not ended.
    """

    tokens_KB: np.ndarray
    logps_KB: np.ndarray
    counts_B: np.ndarray
    active_B: np.ndarray


class Slots:
    """Slots of a model, with what the host knows of them.

    Args:
      model: the model.
      params: its parameters, on one device or over a mesh.
      num_slots: completions decoded at once.
      parts: number of parts into which the mesh splits rows; must divide `num_slots`.
      max_length: cache positions that the longest completion needs.
      sampling: how tokens are drawn.
      eos_ids: tokens that end a completion.
      key: the root of all random keys.
      mesh_wide: replicates over the mesh; None on one device.
      min_length: cache positions to begin with, if more than are usual. A longer cache takes longer to read, and
        growing it compiles a program.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        num_slots: int,
        parts: int,
        max_length: int,
        sampling: Sampling,
        eos_ids: np.ndarray,
        key: Key[Array, ""],
        mesh_wide: NamedSharding | None,
        min_length: int = 0,
    ):
        self._model, self._params, self._mesh_wide = model, params, mesh_wide
        leaf = jax.tree.leaves(params)[0]
        on_cpu = next(iter(leaf.devices())).platform == "cpu"
        rows, self._chunk, shortest = _ON_CPU if on_cpu else _ON_ACCELERATOR
        unit = 64 if on_cpu else CACHE_UNIT
        self._max_length = -(-max_length // unit) * unit
        self._shortest = max(shortest, min_length)
        self._sharding = leaf.sharding if mesh_wide is None else mesh_wide
        self._num_prefixes = min(-(-rows // parts) * parts, num_slots)
        self._key, self._eos_ids, self._sampling = place((key, eos_ids, sampling), self._sharding)
        self._length = self._cache_length(1)
        empty = empty_slots(model, num_slots, self._num_prefixes, self._length, mesh_wide=mesh_wide)
        # Committed to the device, as the programs return it: otherwise each would be compiled twice.
        self._state, self._prefixes = jax.device_put(empty, leaf.sharding) if mesh_wide is None else empty
        self._prefilled: list[bytes] = []
        self._requests: list[Request | None] = [None] * num_slots
        self._positions = np.full(num_slots, -1)

    @property
    def busy(self) -> list[int]:
        """The slots with a completion."""
        return [slot for slot, request in enumerate(self._requests) if request is not None]

    @property
    def idle(self) -> list[int]:
        """The slots without a completion."""
        return [slot for slot, request in enumerate(self._requests) if request is None]

    def request(self, slot: int) -> Request:
        """The completion of a slot that is not idle."""
        request = self._requests[slot]
        assert request is not None, f"slot {slot} is idle"
        return request

    def num_drawn(self, slot: int) -> int:
        """Tokens drawn for the completion of a slot that is not idle."""
        return int(self._positions[slot]) - len(self.request(slot).prompt) + 1

    def free(self, slot: int) -> None:
        """Makes a slot idle."""
        self._requests[slot], self._positions[slot] = None, -1

    def fill(self, requests: dict[int, Request]) -> None:
        """Begins completions in idle slots. Neighbours with the same prompt share its prefill."""
        left = list(requests.items())
        while left:
            if left[0][1].prompt.tobytes() not in self._prefilled:
                distinct = {request.prompt.tobytes(): request.prompt for _, request in left}
                self._prefill(list(distinct.values())[: self._num_prefixes])
            ready = [each for each in left[: self._num_prefixes] if each[1].prompt.tobytes() in self._prefilled]
            self._insert(ready)
            started = {slot for slot, _ in ready}
            left = [each for each in left if each[0] not in started]

    def _prefill(self, prompts: Sequence[np.ndarray]) -> None:
        longest = max(len(prompt) for prompt in prompts) - 1
        self._grow(longest)
        shape = (self._rows_for(len(prompts)), -(-longest // self._chunk) * self._chunk)
        tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt) - 1] = prompt[:-1]
            positions[row, : len(prompt) - 1] = np.arange(len(prompt) - 1)
        for start in range(0, shape[1], self._chunk):
            chunk = place((tokens[:, start:][:, : self._chunk], positions[:, start:][:, : self._chunk]), self._sharding)
            self._prefixes = prefill(self._model, self._params, self._prefixes, *chunk)
        self._prefilled = [prompt.tobytes() for prompt in prompts]

    def _insert(self, requests: Sequence[tuple[int, Request]]) -> None:
        # Padding's slot is past the end, where the scatter drops it.
        inserted = np.zeros((5, self._rows_for(len(requests))), np.int32)
        inserted[1] = len(self._requests)
        for number, (slot, request) in enumerate(requests):
            prompt = request.prompt
            source = self._prefilled.index(prompt.tobytes())
            inserted[:, number] = source, slot, request.row, prompt[-1], len(prompt) - 1
            self._requests[slot], self._positions[slot] = request, len(prompt) - 1
        inserted = place(inserted, self._sharding)
        self._state = insert(self._model, self._state, self._prefixes, inserted, mesh_wide=self._mesh_wide)

    def _rows_for(self, count: int) -> int:
        # Slots often end one at a time, and padding costs as much as prompts.
        return 1 if count == 1 and self._mesh_wide is None else self._num_prefixes

    def decode(self, min_active: int, max_steps: int = _MAX_STEPS) -> Steps:
        """Takes up to `max_steps` decoding steps, 32 at most, until fewer than `min_active` slots are active."""
        last = int(self._positions.max())
        self._grow(last + 1)
        bounds = np.int32(min_active), np.int32(min(max_steps, _MAX_STEPS, self._length - last))
        self._state, *steps = decode(
            self._model, self._params, self._state, *place(bounds, self._sharding), self._key, self._eos_ids,
            self._sampling, mesh_wide=self._mesh_wide,
        )  # fmt: skip
        steps = Steps(*jax.device_get(steps))
        for slot in self.busy:
            self._positions[slot] = len(self.request(slot).prompt) - 1 + steps.counts_B[slot]
        return steps

    def _cache_length(self, needed: int) -> int:
        return min(max(power_of_two(needed), self._shortest), self._max_length)

    def _grow(self, needed: int) -> None:
        if needed > self._length:
            self._length = self._cache_length(needed)
            grown = partial(grow, self._model, length=self._length)
            self._state = dataclasses.replace(self._state, cache=grown(self._state.cache))
            self._prefixes = grown(self._prefixes)


@partial(jax.jit, static_argnames=("model", "num_slots", "num_prefixes", "length", "mesh_wide"))
def empty_slots(
    model: Model, num_slots: int, num_prefixes: int, length: int, *, mesh_wide: NamedSharding | None
) -> tuple[SlotState, Cache]:
    """Idle slots, and an empty prefix cache."""
    zeros = [jnp.zeros(num_slots, jnp.int32) for _ in range(4)]
    state = SlotState(model.init_cache(num_slots, length), zeros[0], zeros[1] - 1, zeros[2], zeros[3])
    return _replicate(state, mesh_wide), model.init_cache(num_prefixes, length)


@partial(jax.jit, static_argnames=("model", "length"))
def grow(model: Model, cache: Cache, *, length: int) -> Cache:
    """A cache of `length` positions that begins with this one."""

    def longer(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
        return model.layout.constrain(padded, CACHE_AXES)

    return jax.tree.map(longer, cache)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    model: Model, params: Params, cache: Cache, tokens_RC: Int[Array, "R C"], positions_RC: Int[Array, "R C"]
) -> Cache:
    """Writes a chunk of prompts to the first R rows of the prefix cache; position -1 is padding."""
    num_rows = len(tokens_RC)
    written = model.decode(params, jax.tree.map(lambda x: x[:num_rows], cache), tokens_RC, positions_RC)[1]
    return jax.tree.map(lambda old, new: old.at[:num_rows].set(new), cache, written)


@partial(jax.jit, static_argnames=("model", "mesh_wide"), donate_argnames="state")
def insert(
    model: Model, state: SlotState, prefixes: Cache, inserted_5I: Int[Array, "5 I"], *, mesh_wide: NamedSharding | None
) -> SlotState:
    """Begins completions in slots.

    Args:
      model: the model.
      state: of the slots.
      prefixes: the prefix cache.
      inserted_5I: of each completion, its prompt's row in the prefix cache, its slot, its number, and the last token of
        its prompt with the position.
      mesh_wide: replicates over the mesh.
    """
    source_I, slot_I, row_I, token_I, position_I = inserted_5I
    cache = jax.tree.map(
        lambda x, y: model.layout.constrain(x.at[slot_I].set(y[source_I], mode="drop"), CACHE_AXES),
        state.cache,
        prefixes,
    )
    new = (token_I, position_I, jnp.zeros_like(row_I), row_I)
    old = (state.tokens_B, state.positions_B, state.counts_B, state.rows_B)
    values = (x.at[slot_I].set(y, mode="drop") for x, y in zip(old, new, strict=True))
    return _replicate(SlotState(cache, *values), mesh_wide)


@partial(jax.jit, static_argnames=("model", "mesh_wide"), donate_argnames="state")
def decode(
    model: Model,
    params: Params,
    state: SlotState,
    min_active: Int[Array, ""],
    max_steps: Int[Array, ""],
    key: Key[Array, ""],
    eos_ids: Int[Array, " E"],
    sampling: Sampling,
    *,
    mesh_wide: NamedSharding | None,
) -> tuple[SlotState, Array, Array, Array, Array]:
    """Up to `max_steps` decoding steps, as long as `min_active` slots are active; returns the fields of `Steps` too."""

    def step(carry: tuple) -> tuple:
        number, state, tokens_KB, logps_KB = carry
        hidden_B1D, cache = model.decode(params, state.cache, state.tokens_B[:, None], state.positions_B[:, None])
        logits_BV = model.logits(params, hidden_B1D[:, 0]).astype(jnp.float32)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, state.rows_B)
        drawn_B = choose_tokens(logits_BV, jax.vmap(jax.random.fold_in)(keys_B, state.counts_B), sampling)
        chosen_B = jnp.take_along_axis(logits_BV, drawn_B[:, None], axis=-1)[:, 0]
        logps_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        active_B = state.positions_B >= 0
        counts_B = state.counts_B + active_B
        ended_B = jnp.any(drawn_B[:, None] == eos_ids[None, :], axis=-1) | (counts_B >= sampling.max_new_tokens)
        positions_B = jnp.where(active_B & ~ended_B, state.positions_B + 1, -1)
        state = _replicate(SlotState(cache, drawn_B, positions_B, counts_B, state.rows_B), mesh_wide)
        return number + 1, state, tokens_KB.at[number].set(drawn_B), logps_KB.at[number].set(logps_B)

    def goes_on(carry: tuple) -> Array:
        number, state, *_ = carry
        return (number < max_steps) & (jnp.sum(state.positions_B >= 0) >= min_active)

    shape = (_MAX_STEPS, len(state.tokens_B))
    start = (jnp.zeros((), jnp.int32), state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, tokens_KB, logps_KB = jax.lax.while_loop(goes_on, step, start)
    # Every process reads all slots.
    drawn = tokens_KB, logps_KB, state.counts_B, state.positions_B >= 0
    return (state, *(drawn if mesh_wide is None else jax.lax.with_sharding_constraint(drawn, mesh_wide)))


def _replicate(state: SlotState, mesh_wide: NamedSharding | None) -> SlotState:
    """The state with everything but its cache replicated, so that all programs take and return equal shardings."""
    if mesh_wide is None:
        return state
    values = (state.tokens_B, state.positions_B, state.counts_B, state.rows_B)
    return SlotState(state.cache, *jax.lax.with_sharding_constraint(values, mesh_wide))


def place(tree: Any, sharding: Sharding) -> Any:
    """Places values that are equal on all processes. Explicit, so that implicit transfers may be disallowed."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(one, tree)
