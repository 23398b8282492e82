"""Rows that are not trained on: rejected because they cannot be used, or skipped because they need not be."""

from __future__ import annotations

import dataclasses

BLANK = "a blank line"
"""Reason for skipping a blank line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """A row that cannot be used."""

    reason: str
    place: str


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A row, or an answer in it, without feedback: it has no label, or its label is mapped to None."""

    reason: str
    place: str
