"""The nearest valid name to one that was misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MIN_SIMILARITY = 0.6
"""Likeness from which one name may be meant by another."""
_INITIALS, _FIRST_WORDS = 0.95, 0.8


def similarity(given: str, name: str) -> float:
    """How probable it is that `name` was meant, from 0 (not at all) to 1 (but for case and underscores the same).

    By letters, in any case; by initials (`lr` is `learning_rate`); or by the first words (`kto` is `kto_llama`).
    """
    given, name = (text.lower().replace("-", "_") for text in (given, name))
    if given.replace("_", "") == name.replace("_", ""):
        return 1.0
    by_initials = len(given) > 1 and given == "".join(part[:1] for part in name.split("_"))
    by_first_words = bool(given) and name.startswith(f"{given}_")
    by_letters = difflib.SequenceMatcher(None, name, given).ratio()
    score = max(_INITIALS * by_initials, _FIRST_WORDS * by_first_words, by_letters)
    return score if score >= _MIN_SIMILARITY else 0.0


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that was probably meant."""
    best = max(allowed, key=lambda candidate: similarity(name, candidate), default=None)
    return best if best is not None and similarity(name, best) else None


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the nearest allowed name, if there is one, and all of them."""
    allowed = list(allowed)
    close = closest(name, allowed)
    return (f"Did you mean {close!r}? " if close else "") + f"Allowed: {', '.join(allowed)}."
