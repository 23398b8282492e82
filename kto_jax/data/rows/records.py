"""Rows of feedback from files: each becomes a `Feedback` or a `Preference`, or a `Rejection` with its reason and place.

`data.format` says what a row holds beside its prompt:

    thumbs            completion, label                a Feedback
    pairs             chosen, rejected                 a Preference
    scores            completion, score                a Feedback whose label is decided later, from all scores
    demonstrations    completion                       a Feedback that is desirable

and `data.layout` where it holds them: `kto_jax.data.rows.layouts`. A row of a chat log may hold several.

A broken row costs only itself. Nothing is guessed: a label is a boolean or is mapped by `data.label_map`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import string
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows import files
from kto_jax.data.rows.files import Rejection
from kto_jax.data.rows.layouts import LAYOUTS, NEEDED, Fields, Names, Rows
from kto_jax.data.rows.turns import (
    SAME_COMPLETIONS,
    TOOLS,
    BadRowError,
    Completion,
    Message,
    check_text,
    decoded,
    message_of,
    part,
    present,
    with_tools,
)

_REPLIES = {name: tuple(key for key in keys if key not in ("label", "score")) for name, keys in NEEDED.items()}
_USUAL_LABELS = (
    *(("1", "0"), ("1", "-1"), ("1.0", "0.0"), ("1.0", "-1.0")),
    *(("True", "False"), ("true", "false"), ("TRUE", "FALSE"), ("yes", "no"), ("up", "down")),
)
"""Texts of labels that spreadsheets and programs write, desirable and undesirable. None is mapped without being set."""
_LARGEST = 3.4e38
"""Weights and scores are kept as float32."""


@dataclasses.dataclass(frozen=True, slots=True)
class Feedback:
    """One completion, and what is said of it.

    Attributes:
      prompt: text, or chat messages `{"role", "content"}` of which the last is not the assistant's, and the first may
        hold tools (`kto_jax.data.rows.turns.TOOLS`).
      completion: what the model is rewarded or punished for; a message where it calls tools.
      desirable: thumbs-up; means nothing yet where rows hold scores.
      weight: how much the row counts, at least 0.
      place: `file:line`, from 1; of a Parquet or JSON file the row's number.
      score: rating, finite; 0 where rows hold none.
    """

    prompt: str | list[Message]
    completion: Completion
    desirable: bool
    weight: float
    place: str
    score: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """Two completions of one prompt, of which the first is preferred.

    Attributes:
      chosen: desirable.
      rejected: undesirable; of the same prompt, weight and place.
    """

    chosen: Feedback
    rejected: Feedback

    @property
    def place(self) -> str:
        """`file:line` of the row."""
        return self.chosen.place


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is left out: its label is mapped to None, or it is a chat log without feedback."""

    place: str


Record = Feedback | Preference | Rejection | Skipped


def completions_of(record: Feedback | Preference) -> tuple[Feedback, ...]:
    """The completions of a row, in the order in which the index holds them."""
    return (record.chosen, record.rejected) if isinstance(record, Preference) else (record,)


def row_of(feedback: Feedback, data: DataConfig) -> dict[str, Any]:
    """A row of the layout "fields" that reads back as this completion.

    Args:
      feedback: read by `records_of`.
      data: by which it was read; scores are kept as scores, and labels as labels.
    """
    prompt, completion = feedback.prompt, feedback.completion
    row: dict[str, Any] = {}
    if isinstance(prompt, list) and prompt[0]["role"] == TOOLS:
        row["tools"], prompt = json.loads(prompt[0]["content"]), prompt[1:]
    row["prompt"] = prompt if isinstance(prompt, str) else [message_of(message) for message in prompt]
    row["completion"] = completion if isinstance(completion, str) else [message_of(completion)]
    if feedback.weight != 1:
        row["weight"] = feedback.weight
    if data.format == "scores":
        row["score"] = feedback.score
    elif data.format != "demonstrations":
        row["label"] = feedback.desirable
    return row


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


def records_of(rows: Iterator[tuple[str, Any]], data: DataConfig) -> Iterator[Record]:
    """Turns the raw rows of a file into records.

    Args:
      rows: place and fields; a `Rejection` in place of the fields where the row could not be read.
      data: which fields hold what.

    Yields:
      Every row, as `Feedback`, `Preference`, `Rejection` or `Skipped`; as several of a chat log with several ratings.

    Raises:
      ConfigError: the first readable row lacks a field, or `data.layout` or `data.prompt_template` is not usable.
    """
    layout = LAYOUTS[data.layout]
    rows = _checked(rows, _required(data), data)
    read = layout.reader(data)
    for place, fields in rows if layout.gather is None else layout.gather(rows):
        if isinstance(fields, Rejection):
            yield fields
            continue
        try:
            examples = read(fields)
        except BadRowError as error:
            yield Rejection(str(error), place)
            continue
        if not examples:
            yield Skipped(place)
        for example, names in examples:
            try:
                yield _record(example, names, data, place)
            except BadRowError as error:
                yield Rejection(str(error), place)


def _required(data: DataConfig) -> list[str]:
    """The columns that every row must have.

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
    needed = [getattr(data, f"{key}_field") for key in NEEDED[data.format]]
    if data.prompt_template:
        return [*template_fields(data.prompt_template), *needed]
    # Chosen and rejected may hold the prompt; a column that is asked for by name must be there.
    may_lack = data.format == "pairs" and data.prompt_field == "prompt"
    return needed if may_lack else [data.prompt_field, *needed]


def _checked(rows: Rows, required: list[str], data: DataConfig) -> Rows:
    """The rows, of which the first must have the columns, and which are objects or rejections."""
    seen_header = False
    if data.layout == "fields":
        columns = {getattr(data, f"{key}_field") for key in ("prompt", *NEEDED[data.format], "tools", "weight")}
        columns |= set(template_fields(data.prompt_template)) if data.prompt_template else set()
    for place, fields in rows:
        if not isinstance(fields, Mapping | Rejection):
            fields = Rejection(f"row is not an object but {type(fields).__name__}", place)
        if not seen_header and not isinstance(fields, Rejection):
            _check_columns(required, fields, data, place)
            if data.layout == "fields":
                _warn_of_unread(fields, data, columns)
            seen_header = True
        yield place, fields


_CONTENT = ("system", "system_prompt", "input", "context", "history", "images", "image", "videos", "audios")
"""Columns that are likely to hold a part of the conversation."""


def _warn_of_unread(fields: Fields, data: DataConfig, read: set[str]) -> None:
    """Names columns that look like content, have some, and are not read."""
    unread = [name for name in _CONTENT if name in fields and name not in read and fields[name]]
    if unread:
        layout = ' data.layout="alpaca" reads system, input and history.' if "instruction" in fields else ""
        print(
            f"warning: the columns {', '.join(map(repr, unread))} look like content and are not read with "
            f"data.layout={data.layout!r}.{layout} data.prompt_template can put them into the prompt.",
            file=sys.stderr,
        )


@functools.lru_cache
def template_fields(template: str) -> list[str]:
    """The fields that `data.prompt_template` names.

    Args:
      template: text for `str.format_map`, with plain field names only.

    Returns:
      The names, in order.

    Raises:
      ConfigError: a name is empty, a number, or reaches into a field by `.` or `[`.
    """
    try:
        parsed = [(name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"data.prompt_template={template!r} cannot be read: {error}. Fields are written {{name}}. "
            "Write literal braces twice."
        ) from error
    names = [name for name, _ in parsed]
    bad = [name for name, spec in parsed if not name or name.isdigit() or "." in name or "[" in name or "{" in spec]
    if bad or not names:
        raise ConfigError(
            f"data.prompt_template={template!r} " + (f"names {bad[0]!r}" if bad else "names no field") + ". "
            "Only plain field names are allowed, such as {title}. Name a column of the file."
        )
    return names


def _check_columns(required: list[str], fields: Fields, data: DataConfig, place: str) -> None:
    columns = list(fields)
    for name in required:
        if name in columns:
            continue
        nearest = difflib.get_close_matches(name, map(str, columns), n=1, cutoff=0.5)
        *others, last = "prompt_field (or prompt_template)", *(f"{key}_field" for key in NEEDED[data.format])
        remedy = f"Set config.data.{', '.join(others)} and {last}; or config.data.format, which is {data.format!r}."
        if data.layout != "fields":
            remedy = f"Set config.data.layout, which is {data.layout!r}."
        raise ConfigError(
            f"{place}: no column {name!r}. The columns are {', '.join(map(repr, columns)) or 'none'}. "
            + (f"Did you mean {nearest[0]!r}? " if nearest else "")
            + remedy
        )


def _record(fields: Fields, names: Names, data: DataConfig, place: str) -> Feedback | Preference | Skipped:
    desirable = data.format == "demonstrations"
    if data.format == "thumbs":
        label = _label(present(fields, names["label"]), data)
        if label is None:
            return Skipped(place)
        desirable = label
    if data.layout == "fields" and data.prompt_template:
        # format_map with the named fields alone: the template cannot reach anything else.
        values = {name: present(fields, name) for name in template_fields(data.prompt_template)}
        prompt: Any = check_text(data.prompt_template.format_map(values), "prompt")
    elif data.format == "pairs":
        prompt = decoded(fields.get(names.get("prompt", "")))
    else:
        prompt = decoded(present(fields, names["prompt"]))
    weight = _weight(fields.get(names.get("weight", data.weight_field)))
    replies = {key: decoded(present(fields, names[key])) for key in _REPLIES[data.format]}
    prompt, completions = part(prompt, replies, may_lack=data.format == "pairs")
    prompt = with_tools(prompt, fields.get(data.tools_field))
    if data.format == "pairs":
        chosen, rejected = completions
        if chosen == rejected:
            raise BadRowError(SAME_COMPLETIONS)
        return Preference(
            Feedback(prompt, chosen, True, weight, place), Feedback(prompt, rejected, False, weight, place)
        )
    score = _score(present(fields, names["score"])) if data.format == "scores" else 0.0
    return Feedback(prompt, completions[0], desirable, weight, place, score)


def _label(value: Any, data: DataConfig) -> bool | None:
    if isinstance(value, bool | str | int | float) and str(value) in data.label_map:
        return data.label_map[str(value)]
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        raise BadRowError(f"label is not mapped: {str(value)[:40]!r}{_label_setting(str(value))}")
    raise BadRowError(f"label is not a boolean, text or number but {type(value).__name__}")


def _label_setting(label: str) -> str:
    """The setting that would read a label written in a usual way, to be appended to the reason; else nothing."""
    for desirable, undesirable in _USUAL_LABELS:
        if label in (desirable, undesirable):
            label_map = {desirable: True, undesirable: False}
            return f'; set --config.data.label_map="{label_map}"'
    return ""


def _weight(value: Any) -> float:
    weight = 1.0 if value is None or value == "" else _number(value)
    if weight is None or weight < 0:
        raise BadRowError(f"weight is not a finite number of at least 0: {str(value)[:40]!r}")
    return weight


def _score(value: Any) -> float:
    score = _number(value)
    if score is None:
        raise BadRowError(f"score is not a finite number: {str(value)[:40]!r}")
    return score


def _number(value: Any) -> float | None:
    """A finite number from a number or text, or None."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None
