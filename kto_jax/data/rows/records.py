"""Rows of feedback from files: each becomes a `Feedback` or a `Preference`, or a `Rejection` with its reason and place.

`data.format` says what a row holds besides its prompt:

    thumbs            completion, label                a Feedback
    pairs             chosen, rejected                 a Preference
    scores            completion, score                a Feedback whose label is decided later, from all scores
    demonstrations    completion                       a Feedback that is desirable

and `data.layout` where it holds them: `kto_jax.data.rows.layouts`. A row of a chat log may hold several.

A broken row affects no other.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows import detect, files
from kto_jax.data.rows.examples import (
    Feedback,
    Preference,
    Record,
    completions_of,
    record_of,
    row_of,
    template_fields,
    unlabelled,
)
from kto_jax.data.rows.layout import NEEDED, Fields, Rows, Skip
from kto_jax.data.rows.layouts import LAYOUTS
from kto_jax.data.rows.rejection import Rejection, Skipped
from kto_jax.data.rows.remedies import Remedies, remedy
from kto_jax.data.rows.turns import BadRowError, described

__all__ = [
    "Feedback", "Preference", "Reading", "Record", "Rejection", "Skipped", "completions_of", "read_as", "read_records",
    "records_of", "row_of", "template_fields",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the rows of a file are read.

    Attributes:
      layout: the configured or detected one.
      fits: the layouts and formats that the first rows fit, if they do not fit those that they are read by.
      records: every row, as `Feedback`, `Preference`, `Rejection` or `Skipped`; as several of a chat log with several
        ratings.
      warnings: what the first rows hold and is not read, already printed.
    """

    layout: str
    fits: list[detect.Fit]
    records: Iterator[Record]
    warnings: tuple[str, ...] = ()


def read_records(source: str, data: DataConfig) -> Iterator[Record]:
    """Reads the rows of a source in order.

    Args:
      source: a file, a glob or `wheel:NAME==VERSION/path/in/wheel`; `data.train` says which formats.
      data: which fields hold what.

    Yields:
      Every row, as `Feedback`, `Preference`, `Rejection` or `Skipped`.

    Raises:
      ConfigError: the source is missing or of no known format, or its first row lacks a field.
    """
    for file in files.expand(source):
        yield from records_of(files.read_rows(file), data)


def records_of(rows: Rows, data: DataConfig) -> Iterator[Record]:
    """The records of `read_as`."""
    return read_as(rows, data).records


def read_as(rows: Rows, data: DataConfig) -> Reading:
    """Turns the raw rows of a file into records.

    Args:
      rows: place and fields; a `Rejection` in place of the fields where the row could not be read.
      data: which fields hold what.

    Returns:
      The records, and the layout that they are read by.

    Raises:
      ConfigError: the first rows lack a field or fit several layouts, or `data.layout` or `data.prompt_template` is not
        usable.
    """
    seen, rows = detect.look(_renamed(rows, data.rename), data)
    _check_renamed(seen, data.rename)
    fitting = detect.fitting(seen, data)
    data = dataclasses.replace(data, layout=detect.choose_layout(seen, data))  # type: ignore[arg-type]
    fits = detect.alternatives(fitting, data)
    required = _required(data)
    _check_columns(required, seen, fits, data)
    warnings = _unread(seen, data, required) if data.layout in _PLAIN and seen.rows else ()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return Reading(data.layout, fits, _records(rows, data), warnings)


def _renamed(rows: Rows, rename: Mapping[str, str]) -> Rows:
    """The rows with some columns under other names; a row that would have two columns of one name is rejected."""
    for place, fields in rows:
        if not isinstance(fields, Mapping) or not rename:
            yield place, fields
            continue
        names = [rename.get(name, name) for name in fields]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is None:
            yield place, dict(zip(names, fields.values(), strict=True))
        else:
            yield place, Rejection(f"data.rename gives several columns the name {twice!r}", place)


def _check_renamed(seen: detect.Seen, rename: Mapping[str, str]) -> None:
    """Refuses to rename a column that none of the first rows has.

    Raises:
      ConfigError: naming it and the columns that there are.
    """
    missing = [old for old, new in rename.items() if seen.rows and not seen.has(new)]
    if missing:
        raise ConfigError(
            f"{seen.place}: no column {missing[0]!r}, which data.rename renames. "
            f"The columns are {', '.join(map(repr, seen.columns))}. Set config.data.rename."
        )


def _records(rows: Rows, data: DataConfig) -> Iterator[Record]:
    layout = LAYOUTS[data.layout]
    data = dataclasses.replace(data, label_map={**layout.labels, **data.label_map})
    read, remedies = layout.reader(data), Remedies(data)
    for place, fields in rows if layout.gather is None else layout.gather(rows):
        if isinstance(fields, Rejection | Skipped):
            yield fields
            continue
        try:
            if not isinstance(fields, Mapping):
                raise BadRowError(f"row is not an object but {described(fields)}")
            _refuse_images(fields)
            examples = read(fields)
        except BadRowError as error:
            yield Rejection(f"{error}{remedies.of(fields, error)}", place)
            continue
        for example in examples:
            if isinstance(example, Skip):
                yield unlabelled(example.reason, data, place)
                continue
            try:
                yield record_of(*example, data, place)
            except BadRowError as error:
                yield Rejection(f"{error}{remedies.of(fields, error)}", place)


def _required(data: DataConfig) -> list[str | tuple[str, ...]]:
    """The columns that the rows must have; of a tuple, one is enough.

    Raises:
      ConfigError: the layout does not hold what the format needs, or has no use for the template.
    """
    columns = LAYOUTS[data.layout].columns
    if data.format not in columns:
        allowed = " or ".join(map(repr, columns))
        raise ConfigError(
            f"data.layout={data.layout!r} holds no {data.format}. With it data.format is {allowed}. "
            "Set config.data.format."
        )
    if data.layout != "fields":
        if data.prompt_template:
            raise ConfigError(
                f"data.prompt_template={data.prompt_template!r} has no use with data.layout={data.layout!r}, which "
                'says where the prompt is. Only the layout "fields" takes a template. Take one of the two out.'
            )
        return list(columns[data.format])
    needed = detect.needed_columns(data)
    return [*template_fields(data.prompt_template), *needed] if data.prompt_template else needed


_PLAIN = ("fields", "messages", "sharegpt", "trl", "kto_mix", "ultrafeedback")
"""Layouts that read the columns they name and no others."""
_CONTENT = (
    *("system", "system_prompt", "system_message", "instruction", "input", "context", "history", "chat_history"),
    *("documents", "tools", "functions"),
    *("chosen", "rejected", "rejected_response", "rejected_messages"),
)
"""Columns that are likely to hold a part of the conversation."""
_IMAGES = ("image", "images", "video", "videos", "audio", "audios", "message_files")
"""Columns that hold images, videos, sounds or files."""


def _refuse_images(fields: Fields) -> None:
    """Rejects a row with an image, a video or a sound.

    Raises:
      BadRowError: it has one.
    """
    name = next((name for name in _IMAGES if fields.get(name)), None)
    if name:
        raise BadRowError(f"{name!r} is not text; only text is trained on")


def _unread(seen: detect.Seen, data: DataConfig, required: list[str | tuple[str, ...]]) -> tuple[str, ...]:
    """A warning that names the columns that look like content, have some, and are not read; nothing without such."""
    read = {data.prompt_field, data.system_field, data.tools_field, data.weight_field}
    read |= {name for names in required for name in ((names,) if isinstance(names, str) else names)}
    unread = [name for name in _CONTENT if name not in read and any(row.get(name) for row in seen.rows)]
    if not unread:
        return ()
    alpaca = ' data.layout="alpaca" reads system, input and history.' if seen.has("instruction") else ""
    system = next((name for name in unread if name.startswith("system")), None)
    system = f" data.system_field={system!r} puts it before the prompt." if system and not alpaca else ""
    return (
        f"the columns {', '.join(map(repr, unread))} look like content and are not read with "
        f"data.layout={data.layout!r}.{alpaca}{system} data.prompt_template can put them into the prompt.",
    )


def _check_columns(
    required: list[str | tuple[str, ...]], seen: detect.Seen, fits: list[detect.Fit], data: DataConfig
) -> None:
    """Refuses a file whose first rows all lack a column.

    Raises:
      ConfigError: naming the columns, the nearest and the settings that would fit.
    """
    for names in required if seen.rows else ():
        if seen.has(names):
            continue
        name = names if isinstance(names, str) else names[0]
        nearest = difflib.get_close_matches(name, seen.columns, n=1, cutoff=0.5)
        *others, last = "prompt_field (or prompt_template)", *(f"{key}_field" for key in NEEDED[data.format])
        ending = f"Set config.data.{', '.join(others)} and {last}; or config.data.format, which is {data.format!r}."
        if data.layout != "fields":
            ending = f"Set config.data.layout, which is {data.layout!r}."
        raise ConfigError(
            f"{seen.place}: no column {name!r}. The columns are {', '.join(map(repr, seen.columns)) or 'none'}. "
            + (f"Did you mean {nearest[0]!r}? " if nearest else "")
            + (f"These rows fit {detect.suggestion(fits)}. " if fits else _hint(seen, data))
            + f"{ending} docs/data.md shows a row of every layout."
        )


def _hint(seen: detect.Seen, data: DataConfig) -> str:
    """The settings that read the first of the rows, or why none can."""
    found = remedy(seen.rows[0], data).removeprefix("; ")
    if found:
        return f"For these rows: {found}. "
    if {"text"} == {name for name in seen.columns if seen.holds(name)} - {"id", "meta"}:
        return (
            "A text alone does not say where its completion begins. Split it into columns prompt and completion, or "
            "into messages. "
        )
    ids = [name for name in ("run_id", "trace_id", "traceId", "call_id", "message_id") if seen.holds(name)]
    if ids and (seen.holds(("score", "value", "rating", "key"))):
        return f"The rows hold ratings without text: join them by {ids[0]!r} to the prompts and completions. "
    return ""
