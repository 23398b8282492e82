"""The reward of `benchmarks.online_trl`, a function in TRL's form that all contenders call. Needs only Python."""

from __future__ import annotations

from typing import Any

MOST = 15
"""Words of an answer that is short enough."""


def short(completions: list[str], **columns: Any) -> list[float]:
    """1 for each completion of at least one word and at most `MOST`, else 0."""
    return [float(1 <= len(text.split()) <= MOST) for text in completions]
