"""What a layout is: which columns of a row hold its prompt, completions and feedback.

A layout reads a row as one or more examples, each a mapping and which of its names hold what.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.turns import lookup

Fields = Mapping[str, Any]
Names = dict[str, Any]
"""From prompt, completion, label, score, chosen, rejected and weight to a column; the weight may be absent, and so may
the prompt of a pair."""


@dataclasses.dataclass(frozen=True)
class Skip:
    """An answer that is skipped, with the reason."""

    reason: str


Examples = list[tuple[Fields, Names] | Skip]
Reader = Callable[[Fields], Examples]
Rows = Iterator[tuple[str, Any]]

NEEDED = {
    "thumbs": ("completion", "label"),
    "pairs": ("chosen", "rejected"),
    "scores": ("completion", "score"),
    "demonstrations": ("completion",),
}
"""What an example of each `data.format` holds besides its prompt."""


def _never(fields: Fields) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a file are read.

    Attributes:
      columns: for each `data.format` that the layout can hold, the columns that its rows must have; of a tuple, one
        is enough.
      reader: makes, once for a file, the function that gives the examples of a row. That raises `BadRowError`.
      gather: makes rows of examples from all rows of a file, where one row alone is no example.
      fits: whether a row looks like this layout and no other. By default never: `data.layout="auto"` does not choose
        the layouts that "fields" reads as well.
      labels: what the labels of this layout mean, beside `data.label_map`.
    """

    columns: Mapping[str, tuple[str | tuple[str, ...], ...]]
    reader: Callable[[DataConfig], Reader]
    gather: Callable[[Rows], Rows] | None = None
    fits: Callable[[Fields], bool] = _never
    labels: Mapping[str, bool | None] = dataclasses.field(default_factory=dict)


def by_row(read: Callable[[DataConfig, Fields], Examples]) -> Callable[[DataConfig], Reader]:
    """A reader for rows each of which determines what its columns hold."""
    return lambda data: functools.partial(read, data)


def named(*keys: str) -> Callable[[DataConfig], Reader]:
    """A reader for columns that are named by what they hold."""
    names = {key: key for key in keys}
    return lambda data: lambda fields: [(fields, names)]


def has(*names: str) -> Callable[[Fields], bool]:
    """Whether a row has all of some columns, each by its name or a dotted path."""
    return lambda fields: all(lookup(fields, name) is not None for name in names)


def rating_names(data: DataConfig) -> tuple[str, ...]:
    """The columns that may hold the label or score of a row."""
    found = data.label_field if data.format == "thumbs" else data.score_field
    return (found,) if isinstance(found, str) else found


def example(fields: Fields, prompt: Any, completion: Any, **rating: Any) -> tuple[Fields, Names]:
    """An example of one completion: the row's own fields, and those given here by the names that records use."""
    held = {"prompt": prompt, "completion": completion, **rating}
    return {**fields, **held}, {key: key for key in held}
