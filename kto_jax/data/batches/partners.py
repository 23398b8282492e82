"""Which unrelated completion each prompt of a batch is read with, for KTO's reference point z0."""

from __future__ import annotations

import numpy as np


def find_partners(prompt_hashes: np.ndarray) -> np.ndarray:
    """Gives every example of a batch the next one, cyclically, whose prompt differs.

        prompts    a a b c a     next with another prompt
        partners   2 2 3 4 2

    Args:
      prompt_hashes: equal where the prompts are equal [batch].

    Returns:
      Positions in the batch, or -1 everywhere if all prompts are the same [batch], int64.
    """
    count = len(prompt_hashes)
    # Positions whose successor has another prompt: the partner of i is the successor of the first such one from i on.
    ends = np.flatnonzero(prompt_hashes != np.roll(prompt_hashes, -1))
    if not len(ends):
        return np.full(count, -1, np.int64)
    first = np.searchsorted(ends, np.arange(count))
    return (ends[first % len(ends)] + 1) % count
