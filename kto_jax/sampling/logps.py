"""Log-probabilities of given completions under a model."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from kto_jax.devices.inference import whole_parts
from kto_jax.models.gather import gather
from kto_jax.models.model import Model, Params
from kto_jax.shapes import PackedRows
from kto_jax.training.forward import packed_logps

_ROWS = 8
"""Completions per batch, or the next multiple of the parts into which a mesh divides rows."""


def completion_logps(
    model: Model, params: Params, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
) -> Float[np.ndarray, " N"]:
    """The log-probability of each completion given its prompt, summed over its tokens, in nats.

    Args:
      model: the model.
      params: its parameters, on one device or over a mesh.
      prompts: token ids.
      completions: token ids; one completion for each prompt.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    score = jax.jit(lambda params, rows: packed_logps(model, params, rows))
    found, num_rows = np.zeros(len(prompts)), whole_parts(_ROWS, params)
    for start in range(0, len(prompts), num_rows):
        batch = list(zip(prompts, completions, strict=True))[start : start + num_rows]
        rows = _one_per_row(batch, (num_rows, length))
        found[start : start + len(batch)] = gather(score(params, rows))[: len(batch), 0]
    return found


def _one_per_row(examples: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> PackedRows:
    """Rows of one example each, right-padded; unused rows are all padding."""
    num_rows, length = shape
    tokens, segment_ids, predictors, targets, target_segments = np.zeros((5, num_rows, length), np.int32)
    for row, (prompt, completion) in enumerate(examples):
        ids = np.concatenate([prompt, completion])
        tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
        predictors[row, : len(completion)] = len(prompt) - 1 + np.arange(len(completion))
        targets[row, : len(completion)], target_segments[row, : len(completion)] = completion, 1
    positions = np.where(segment_ids > 0, np.arange(length, dtype=np.int32)[None], 0)
    filled = np.arange(num_rows)[:, None] < len(examples)
    return PackedRows(tokens, segment_ids, positions, predictors, targets, target_segments, filled)
