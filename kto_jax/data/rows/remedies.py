"""What would read a row that is rejected: settings that are tried on it, so that none is named in vain."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.detect import Fit, Seen, fitting
from kto_jax.data.rows.examples import Feedback, Preference, UnmappedLabelError, record_of
from kto_jax.data.rows.layout import NEEDED, Fields, Skip
from kto_jax.data.rows.layouts import LAYOUTS
from kto_jax.data.rows.turns import BadRowError, lookup

_USUAL = {
    "prompt": (
        *("prompt", "instruction", "question", "query", "input", "inputs", "request", "messages", "text", "user"),
        *("customer", "subject", "conversation", "conversations"),
    ),
    "completion": (
        *("completion", "response", "answer", "output", "outputs", "reply", "generation", "text", "assistant", "agent"),
        "bot",
    ),
    "label": (
        *("label", "labels", "feedback", "rating", "thumb", "thumbs", "vote", "answer", "choices", "emoji", "value"),
        *("liked", "csat", "satisfaction", "verdict"),
    ),
    "score": ("score", "rating", "stars", "reward", "helpfulness", "quality", "value"),
    "chosen": ("chosen", "preferred", "accepted"),
    "rejected": ("rejected", "dispreferred", "non_preferred"),
}
"""Names, or words in names, of what programs keep for an example; the likeliest first."""
_BESIDE = ("tools", "system")
"""What a request holds beside its messages."""
_NUM_KINDS = 1000
"""Kinds of rejected rows of a file for which settings are tried, each in about a millisecond."""
_NUM_PATHS = 200
_DEPTH = 7
_NUM_NAMES = 3


class Remedies:
    """What would read the rejected rows of one file; of rows that are alike, the first is tried.

    Args:
      data: by which the rows are read.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._found: dict[tuple[str, ...], str] = {}

    def of(self, fields: Any, error: BadRowError) -> str:
        """The remedy of a row that was rejected for this reason; "" for a label, whose reason says what to do."""
        if not isinstance(fields, Mapping) or isinstance(error, UnmappedLabelError):
            return ""
        key = (str(error), *(f"{name} {type(value).__name__}" for name, value in fields.items()))
        if key not in self._found and len(self._found) < _NUM_KINDS:
            self._found[key] = remedy(fields, self._data)
        return self._found.get(key, "")


def remedy(fields: Any, data: DataConfig) -> str:
    """The settings that read a row, in words to be appended to the reason; "" if none is found.

    Args:
      fields: of the row.
      data: by which it was rejected.
    """
    fits: list[Fit] = fitting(Seen([fields], ""), data) if isinstance(fields, Mapping) else [(data.layout, data.format)]
    if data.layout != "fields" and (data.layout, data.format) in fits:
        return ""  # The row is of this layout, and what is wrong with it is a value.
    for tried in (*_other_layouts(fits, data), *_other_columns(fields, data), *_other_names(fields, data)):
        reads, unmapped = _reads(fields, tried)
        names = ("layout", "format", "rename", *(f"{key}_field" for key in (*_USUAL, "tools", "system")))
        own = [name for name in names if getattr(tried, name) != getattr(data, name)]
        # "fields" is read without being set if a column is named.
        own = [name for name in own if name != "layout" or tried.layout != "fields" or len(own) == 1]
        if reads and own:
            settings = " with ".join(f"config.data.{name}={getattr(tried, name)!r}" for name in own)
            return f"; {settings} reads it{', but ' * bool(unmapped)}{unmapped}"
    return ""


def _other_layouts(fits: list[Fit], data: DataConfig) -> Iterator[DataConfig]:
    """The layouts that the row looks like, those of the same format first."""
    for layout, format in sorted(fits, key=lambda fit: fit[1] != data.format):
        if (layout, format) not in ((data.layout, data.format), ("fields", "demonstrations")):
            yield dataclasses.replace(data, layout=layout, format=format)  # type: ignore[arg-type]


def _other_columns(fields: Fields, data: DataConfig) -> Iterator[DataConfig]:
    """The layout "fields" with columns, or paths into them, that have usual names."""
    if data.prompt_template or data.layout != "fields" or not isinstance(fields, Mapping):
        return
    paths = list(itertools.islice(_paths(fields, "", _DEPTH), _NUM_PATHS))
    keys = ("prompt", *NEEDED[data.format])
    options = []
    for key in keys:
        own = getattr(data, f"{key}_field")
        usual = [path for name in _USUAL[key] for path in paths if _last(path) == name]
        usual += [path for name in _USUAL[key] for path in paths if name in re.split(r"\W|_", _last(path))]
        own_is_there = isinstance(own, str) and lookup(fields, own) is not None
        options.append([*([own] if own_is_there else []), *dict.fromkeys(usual)][: _NUM_NAMES + 1])
    for chosen in itertools.product(*options):
        if not any(f"{one}.".startswith(f"{other}.") for one, other in itertools.permutations(chosen, 2)):
            names: dict[str, Any] = {f"{key}_field": path for key, path in zip(keys, chosen, strict=True)}
            beside = chosen[0].rpartition(".")[0]
            names |= {f"{name}_field": f"{beside}.{name}" for name in _BESIDE if lookup(fields, f"{beside}.{name}")}
            yield dataclasses.replace(data, layout="fields", **names)


def _other_names(fields: Fields, data: DataConfig) -> Iterator[DataConfig]:
    """The layouts of conversations, with each column that holds turns renamed to the column that they read."""
    for name in fields if isinstance(fields, Mapping) and not data.rename else ():
        for layout, column in (("messages", "messages"), ("sharegpt", "conversations")):
            if name != column and LAYOUTS[layout].fits({column: fields[name]}):
                yield dataclasses.replace(data, layout=layout, rename={name: column})  # type: ignore[arg-type]


def _paths(value: Any, path: str, depth: int) -> Iterator[str]:
    """Dotted paths to what an object holds, those that are near first."""
    if not isinstance(value, Mapping | list) or depth == 0:
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value[:1])
    found = [(f"{path}.{name}".removeprefix("."), held) for name, held in items]
    yield from (own for own, held in found if held not in (None, "", [], {}))
    for own, held in found:
        yield from _paths(held, own, depth - 1)


def _last(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _reads(fields: Fields, data: DataConfig) -> tuple[bool, str]:
    """Whether the row gives an example by these settings, and which label is then still to be mapped."""
    layout = LAYOUTS[data.layout]
    if layout.gather is not None or data.format not in layout.columns:
        return False, ""
    data = dataclasses.replace(data, label_map={**layout.labels, **data.label_map})
    fields = {data.rename.get(name, name): value for name, value in fields.items()}
    try:
        for one in layout.reader(data)(fields):
            if not isinstance(one, Skip) and isinstance(record_of(*one, data, ""), Feedback | Preference):
                return True, ""
    except UnmappedLabelError as error:
        # The other columns are read once the label is.
        label = str(error)
        known = dataclasses.replace(data, label_map={**data.label_map, error.label: True})
        return _reads(fields, known)[0], label
    except BadRowError:
        pass
    return False, ""
