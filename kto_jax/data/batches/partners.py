"""Partners: the unrelated completion for each prompt of a batch, for KTO's reference point z0."""

from __future__ import annotations

import numpy as np


def find_partners(prompt_hashes: np.ndarray) -> np.ndarray:
    """The partner of every example of a batch: cyclically the next one whose prompt differs.

        prompts    a a b c a     next with another prompt
        partners   2 2 3 4 2

    Args:
      prompt_hashes: equal if the prompts are equal [batch].

    Returns:
      Positions in the batch, or -1 everywhere if all prompts are the same [batch], int64.
    """
    count = len(prompt_hashes)
    # Positions whose successor has another prompt: the partner of i is the successor of the first of them from i on.
    ends = np.flatnonzero(prompt_hashes != np.roll(prompt_hashes, -1))
    if not len(ends):
        return np.full(count, -1, np.int64)
    first = np.searchsorted(ends, np.arange(count))
    return (ends[first % len(ends)] + 1) % count
