"""Figures of a set of completions that need no judge: length, cuts, diversity and loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

_LOOP = 4
"""Words of a phrase that counts as a loop if it occurs three times in a completion."""


def describe_texts(texts: Sequence[str]) -> dict[str, float]:
    """Figures of some completions; NaN where there is nothing to count.

    Returns:
      words, characters: mean lengths. empty: share without text. distinct pairs: different pairs of adjacent words in
      all completions, as a share of all such pairs (distinct-2, Li et al., 2016). duplicates: share of completions that
      another one equals. loops: share in which four words in a row occur three times.
    """
    words = [text.split() for text in texts]
    pairs = list(itertools.chain.from_iterable(itertools.pairwise(each) for each in words))
    counts = {text: 0 for text in texts}
    for text in texts:
        counts[text] += 1
    return {
        "words": _mean([len(each) for each in words]),
        "characters": _mean([len(text) for text in texts]),
        "empty": _mean([not text.strip() for text in texts]),
        "distinct pairs": len(set(pairs)) / len(pairs) if pairs else float("nan"),
        "duplicates": _mean([counts[text] > 1 for text in texts]),
        "loops": _mean([_has_loop(each) for each in words]),
    }


def _has_loop(words: Sequence[str]) -> bool:
    seen: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - _LOOP + 1):
        phrase = tuple(words[start : start + _LOOP])
        seen[phrase] = seen.get(phrase, 0) + 1
    return max(seen.values(), default=0) >= 3


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
