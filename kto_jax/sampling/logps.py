"""Log-probabilities of given completions under a model."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from kto_jax.models.gather import gather
from kto_jax.models.model import Model, Params
from kto_jax.shapes import PackedRows
from kto_jax.training.forward import packed_logps

_ROWS = 8
"""Completions per batch."""


def completion_logps(
    model: Model, params: Params, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
) -> Float[np.ndarray, " N"]:
    """The log-probability of each completion given its prompt, summed over its tokens, in nats.

    Args:
      model: the model.
      params: its parameters.
      prompts: token ids.
      completions: token ids; one completion for each prompt.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    score = jax.jit(lambda params, rows: packed_logps(model, params, rows))
    found = np.zeros(len(prompts))
    for start in range(0, len(prompts), _ROWS):
        batch = list(zip(prompts, completions, strict=True))[start : start + _ROWS]
        found[start : start + len(batch)] = gather(score(params, _one_per_row(batch, length)))[: len(batch), 0]
    return found


def _one_per_row(examples: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> PackedRows:
    """Rows of one example each, right-padded to `length`; unused rows are all padding."""
    tokens, segment_ids, predictors, targets, target_segments = np.zeros((5, _ROWS, length), np.int32)
    for row, (prompt, completion) in enumerate(examples):
        ids = np.concatenate([prompt, completion])
        tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
        predictors[row, : len(completion)] = len(prompt) - 1 + np.arange(len(completion))
        targets[row, : len(completion)], target_segments[row, : len(completion)] = completion, 1
    positions = np.where(segment_ids > 0, np.arange(length, dtype=np.int32)[None], 0)
    filled = np.arange(_ROWS)[:, None] < len(examples)
    return PackedRows(tokens, segment_ids, positions, predictors, targets, target_segments, filled)
