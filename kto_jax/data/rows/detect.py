"""Detects the layout of a file's rows: `data.layout="auto"` looks at the first ones.

A layout fits if most of the rows look like it. If one fits, it is chosen and reported. If several fit, the choice is
the user's. If none does, "fields" reports the columns that it needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.layout import NEEDED, Fields, Rows
from kto_jax.data.rows.layouts import LAYOUTS
from kto_jax.data.rows.turns import lookup

_NUM_SEEN = 100
_NUM_COLUMNS = 12
_ABSENT = object()
_COLUMN_FIELDS = ("prompt_field", "prompt_template", "completion_field", "chosen_field", "rejected_field")
"""Settings that name a column of the layout "fields" alone."""

Fit = tuple[str, str]
"""A layout and a format."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """The first rows of a file.

    Attributes:
      rows: the rows that are objects.
      place: of the first row; "" if there is none.
    """

    rows: list[Fields]
    place: str

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in order of first occurrence."""
        return list(dict.fromkeys(str(name) for row in self.rows for name in row))

    def holds(self, names: str | tuple[str, ...]) -> bool:
        """Whether any row has a value, not null, in the column, or in one of several."""
        names = (names,) if isinstance(names, str) else names
        return any(lookup(row, name) is not None for row in self.rows for name in names)

    def has(self, names: str | tuple[str, ...]) -> bool:
        """Whether any row has the column, or one of several; by name or dotted path."""
        names = (names,) if isinstance(names, str) else names
        return any(lookup(row, name, _ABSENT) is not _ABSENT for row in self.rows for name in names)


def look(rows: Iterable[tuple[str, Any]], data: DataConfig) -> tuple[Seen, Rows]:
    """The first rows, and all rows including them; if the layout is set, as few as needed, since a pipe may be slow."""
    rows, first = iter(rows), []
    for place, fields in rows:
        first.append((place, fields))
        if len(first) == _NUM_SEEN or (data.layout != "auto" and isinstance(fields, Mapping)):
            break
    found = [(place, fields) for place, fields in first if isinstance(fields, Mapping)]
    seen = Seen([fields for _, fields in found], found[0][0] if found else "")
    return seen, itertools.chain(first, rows)


def needed_columns(data: DataConfig) -> list[str | tuple[str, ...]]:
    """The columns that the layout "fields" needs besides the template's; of a tuple, one is enough."""
    needed = [getattr(data, f"{key}_field") for key in NEEDED[data.format]]
    # Chosen and rejected may hold the prompt; a column that is configured must be there.
    may_lack = data.prompt_template or (data.format == "pairs" and data.prompt_field == "prompt")
    return needed if may_lack else [data.prompt_field, *needed]


def fitting(seen: Seen, data: DataConfig) -> list[Fit]:
    """The layouts that the rows look like, each with the formats that it can then hold.

    Args:
      seen: the first rows.
      data: names the columns of the layout "fields".
    """
    if not seen.rows:
        return []
    fields = [
        ("fields", format)
        for format in NEEDED
        if all(map(seen.holds, needed_columns(dataclasses.replace(data, format=format))))  # type: ignore[arg-type]
    ]
    return fields + [
        (name, format)
        for name, layout in LAYOUTS.items()
        if 2 * sum(map(layout.fits, seen.rows)) >= len(seen.rows)
        for format, columns in layout.columns.items()
        if all(map(seen.has, columns))
    ]


def choose_layout(seen: Seen, data: DataConfig) -> str:
    """The layout that reads the rows: the configured one, or the detected one, which is then reported.

    Raises:
      ConfigError: several layouts fit.
    """
    if data.layout != "auto":
        return data.layout
    given = [name for name in _COLUMN_FIELDS if getattr(data, name) != getattr(DataConfig, name)]
    if given:
        return "fields"
    chosen = [layout for layout, format in fitting(seen, data) if format == data.format]
    columns = ", ".join(map(repr, seen.columns[:_NUM_COLUMNS])) + (", ..." if len(seen.columns) > _NUM_COLUMNS else "")
    if len(chosen) > 1:
        raise ConfigError(
            f"{seen.place}: the columns are {columns}, which fit several layouts: {', '.join(map(repr, chosen))}. "
            "Only one can be read. Set config.data.layout."
        )
    if chosen:
        print(
            f'{seen.place.rpartition(":")[0]}: the columns are {columns}; data.layout="auto" reads them as '
            f"{chosen[0]!r}, data.format={data.format!r}",
            file=sys.stderr,
        )
    return chosen[0] if chosen else "fields"


def alternatives(fits: list[Fit], data: DataConfig) -> list[Fit]:
    """The layouts and formats that the rows fit, if they do not fit the current ones."""
    if (data.layout, data.format) in fits:
        return []
    every = ("fields", "demonstrations")  # It fits any row with a completion.
    return [fit for fit in fits if fit != every] or fits


def suggestion(fits: list[Fit]) -> str:
    """A sentence with the settings that would read the rows; "" if there are none."""
    return " or ".join(f"config.data.layout={one!r} with config.data.format={two!r}" for one, two in fits[:3])
