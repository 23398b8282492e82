"""Completions of one prompt beside each other, with the words that differ marked."""

from __future__ import annotations

import difflib
import re
from typing import Any

Parts = list[tuple[str, bool]]
"""Pieces of a text, and whether each is marked."""
_ALIKE = 0.35
"""Texts that are less alike are not marked: all of them would be."""


def mark_differences(before: str, after: str) -> tuple[Parts, Parts]:
    """Both texts in pieces; those that the other one lacks are marked, unless the two are hardly alike."""
    old, new = (re.findall(r"\s+|[^\s]+", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return _whole(before), _whole(after)
    left: Parts = []
    right: Parts = []
    for kind, i, j, k, m in matcher.get_opcodes():
        if j > i:
            left.append(("".join(old[i:j]), kind != "equal"))
        if m > k:
            right.append(("".join(new[k:m]), kind != "equal"))
    return left, right


def _whole(text: str) -> Parts:
    return [(text, False)] if text else []


def card(
    prompt: Any,
    names: tuple[str, str],
    texts: tuple[str, str],
    *,
    cut: tuple[bool, bool] = (False, False),
    scores: tuple[str, str] = ("", ""),
    kinds: str = "",
) -> dict[str, Any]:
    """One prompt with two completions, as the macro `sample_card` shows it.

    Args:
      prompt: text or chat messages.
      names: of the two sides.
      texts: their completions.
      cut: whether each was cut at the longest length.
      scores: what a judge gave each; may be empty.
      kinds: words that the page's filter knows, separated by spaces.
    """
    marked = mark_differences(*texts)
    tags = ("del", "ins")
    sides = [
        {"name": names[i], "parts": marked[i], "tag": tags[i], "cut": cut[i], "score": scores[i]} for i in range(2)
    ]
    return {"prompt": prompt, "sides": sides, "kinds": kinds}
