"""Sampling completions of token ids with continuous batching: a slot that has ended takes the next prompt."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from kto_jax.config import ConfigError
from kto_jax.devices.inference import parts_of_rows, whole_parts
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model, Params
from kto_jax.models.unstacked import unstack_layers
from kto_jax.sampling.choose import Sampling as Sampling
from kto_jax.sampling.slots import Request, Slots


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One completion.

    Attributes:
      ids: int32 token ids, including the EOS if it ended in one.
      logps: float32 log-probability of each token in nats under the model itself, as training computes it: at
        temperature 1, with nothing cut.
    """

    ids: np.ndarray
    logps: np.ndarray


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
    """Completes prompts: the ids of `sample_with_logps`, with the same arguments."""
    sampled = sample_with_logps(
        model, params, prompts, sampling, eos_id=eos_id, key=key, batch_size=batch_size, on_batch=on_batch
    )
    return [completion.ids for completion in sampled]


def sample_with_logps(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray | Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int | Sequence[int],
    key: Key[Array, ""],
    batch_size: int = 16,
    on_batch: Callable[[int], object] | None = None,
) -> list[Sampled]:
    """Completes prompts, and returns the log-probabilities of the tokens.

    Completion i draws from `fold_in(key, i)`, so it does not depend on the other prompts or on `batch_size`, except for
    rounding. A prompt that occurs several times, for several completions, is prefilled once. Every process of a run
    must make the same call.

    Args:
      model: the model.
      params: its parameters, on one device or over a mesh.
      prompts: token ids of each prompt; none may be empty.
      sampling: how completions are drawn.
      eos_id: the id that ends a completion, or several.
      key: from `jax.random.key`.
      batch_size: completions sampled at once. Over a mesh it is raised to the next multiple of the parts that the mesh
        divides rows into.
      on_batch: called when completions have ended, with their number.

    Returns:
      The completions, in the order of the prompts.

    Raises:
      ConfigError: as `check_sampling` and `check_prompts`.
    """
    ids = [np.asarray(prompt, np.int32) for prompt in prompts]
    check_sampling(sampling, batch_size)
    max_new_tokens = int(sampling.max_new_tokens)
    check_prompts(model.config, ids, max_new_tokens)
    if not ids:
        return []
    mesh_wide, parts = _replicated(params), parts_of_rows(params)
    slots = Slots(
        model,
        unstack_layers(params),
        num_slots=whole_parts(batch_size, params),
        parts=parts,
        # The last token of a completion is never fed back.
        max_length=max(map(len, ids)) + max_new_tokens - 1,
        sampling=Sampling(
            np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.top_k),
            np.int32(max_new_tokens),
        ),
        eos_ids=np.atleast_1d(np.asarray(eos_id, np.int32)),
        key=key,
        mesh_wide=mesh_wide,
    )  # fmt: skip
    completions = _complete(slots, ids, on_batch or (lambda _: None))
    return [completions[row] for row in range(len(ids))]


def _complete(slots: Slots, prompts: list[np.ndarray], on_batch: Callable[[int], object]) -> dict[int, Sampled]:
    """The completion of each prompt. Short prompts go first, and those that are equal side by side."""
    requests = [Request(row, prompt) for row, prompt in enumerate(prompts)]
    waiting = collections.deque(sorted(requests, key=lambda each: (len(each.prompt), each.prompt.tobytes())))
    drawn: dict[int, list[Sampled]] = {request.row: [] for request in requests}
    num_left = len(requests)
    while num_left:
        slots.fill({slot: waiting.popleft() for slot in slots.idle[: len(waiting)]})
        before = {slot: slots.num_drawn(slot) for slot in slots.busy}
        steps = slots.decode(min_active=len(before) if waiting else 1)
        for slot, start in before.items():
            num_new = steps.counts_B[slot] - start
            new = Sampled(steps.tokens_KB[:num_new, slot], steps.logps_KB[:num_new, slot])
            drawn[slots.request(slot).row].append(new)
            if not steps.active_B[slot]:
                slots.free(slot)
        num_ended = len(before) - len(slots.busy)
        num_left -= num_ended
        if num_ended:
            on_batch(num_ended)
    return {row: _joined(pieces) for row, pieces in drawn.items()}


def _joined(pieces: list[Sampled]) -> Sampled:
    return Sampled(np.concatenate([piece.ids for piece in pieces]), np.concatenate([piece.logps for piece in pieces]))


def _replicated(params: Params) -> NamedSharding | None:
    """The sharding that replicates over the mesh of the parameters; None if they are on no mesh."""
    sharding = jax.tree.leaves(params)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


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
