"""The nearest valid name to one that was misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that was probably meant: by letters in any case, or by initials (`lr` is `learning_rate`)."""
    names = {candidate.lower(): candidate for candidate in allowed}
    given = name.lower()
    found = difflib.get_close_matches(given, names, n=1)
    initials = [candidate for candidate in names if given == "".join(part[:1] for part in candidate.split("_"))]
    return names[found[0]] if found else names[initials[0]] if len(given) > 1 and initials else None


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the nearest allowed name, if there is one, and all of them."""
    allowed = list(allowed)
    close = closest(name, allowed)
    return (f"Did you mean {close!r}? " if close else "") + f"Allowed: {', '.join(allowed)}."
