"""Truncation of prompts and completions: the prompt is truncated first, from the left."""

from __future__ import annotations

import numpy as np

Lengths = int | np.ndarray


def fit_lengths(
    num_prompt: Lengths, num_completion: Lengths, *, max_length: Lengths, max_prompt_length: Lengths
) -> tuple[np.ndarray, np.ndarray]:
    """Number of tokens of a prompt and of a completion that are kept; elementwise on arrays.

        max_length 8, max_prompt_length 4
        prompt 5, completion 3   ->  5, 3    both fit together: nothing is cut
        prompt 9, completion 3   ->  4, 3    they do not: the prompt is cut to max_prompt_length
        prompt 9, completion 6   ->  2, 6    and to the room that the completion leaves
        prompt 9, completion 9   ->  1, 7    the prompt keeps one token, the rest of the completion is cut

    Args:
      num_prompt: tokens of the prompt, at least 1.
      num_completion: tokens of the completion, its EOS included.
      max_length: maximum tokens of the two together, at least 2.
      max_prompt_length: maximum tokens of the prompt if the two do not fit together.

    Returns:
      Tokens kept of the prompt (the last ones) and of the completion (the first ones).
    """
    kept_completion = np.minimum(num_completion, max_length - 1)
    room = max_length - kept_completion
    kept_prompt = np.where(num_prompt <= room, num_prompt, np.minimum(room, np.maximum(max_prompt_length, 1)))
    return kept_prompt, kept_completion


def cut_prompt(ids: np.ndarray, num_kept: int, bos_id: int | None) -> np.ndarray:
    """The last `num_kept` ids of a prompt; a leading BOS is kept if there is room for a second token.

    Args:
      ids: the prompt's ids [length].
      num_kept: number of ids to keep, at least 1.
      bos_id: the BOS id to keep at the front, or None.

    Returns:
      Ids [min(length, num_kept)].
    """
    if len(ids) <= num_kept:
        return ids
    if bos_id is not None and ids[0] == bos_id and num_kept >= 2:
        return np.concatenate([ids[:1], ids[len(ids) - num_kept + 1 :]])
    return ids[len(ids) - num_kept :]
