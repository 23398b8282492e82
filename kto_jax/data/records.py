"""Rows of feedback from files: each becomes a `Feedback`, or a `Rejection` with its reason and place.

A broken row costs only itself. Nothing is guessed: a label is a boolean or is mapped by `data.label_map`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import string
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data import files
from kto_jax.data.files import Rejection

Message = dict[str, str]

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, slots=True)
class Feedback:
    """One thumb.

    Attributes:
      prompt: text, or chat messages `{"role", "content"}` of which the last is not the assistant's.
      completion: what the model is rewarded or punished for.
      desirable: thumbs-up.
      weight: how much the row counts, at least 0.
      place: `file:line`, from 1; of a Parquet or JSON file the row's number.
    """

    prompt: str | list[Message]
    completion: str
    desirable: bool
    weight: float
    place: str


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A row that the configuration leaves out: its label is mapped to None."""

    place: str


class _BadRowError(ValueError):
    """The row is rejected; the message is the reason."""


def read_records(source: str, data: DataConfig) -> Iterator[Feedback | Rejection | Skipped]:
    """Reads the rows of a source in order.

    Args:
      source: a file, a glob or `wheel:NAME==VERSION/path/in/wheel`; `data.train` says which formats.
      data: which fields hold what.

    Yields:
      Every row, as `Feedback`, `Rejection` or `Skipped`.

    Raises:
      ConfigError: the source is missing or of no known format, or its first row lacks a field.
    """
    for file in files.expand(source):
        yield from records_of(files.read_rows(file), data)


def records_of(rows: Iterator[tuple[str, Any]], data: DataConfig) -> Iterator[Feedback | Rejection | Skipped]:
    """Turns raw rows into records.

    Args:
      rows: place and fields; a `Rejection` in place of the fields where the row could not be read.
      data: which fields hold what.

    Yields:
      Every row, as `Feedback`, `Rejection` or `Skipped`.

    Raises:
      ConfigError: the first readable row lacks a field, or `data.prompt_template` is not usable.
    """
    prompt_fields = template_fields(data.prompt_template) if data.prompt_template else [data.prompt_field]
    required = [*prompt_fields, data.completion_field, data.label_field]
    seen_header = False
    for place, fields in rows:
        if isinstance(fields, Rejection):
            yield fields
            continue
        if not isinstance(fields, Mapping):
            yield Rejection(f"row is not an object but {type(fields).__name__}", place)
            continue
        if not seen_header:
            _check_columns(required, fields, place)
            seen_header = True
        try:
            yield _record(fields, prompt_fields, data, place)
        except _BadRowError as error:
            yield Rejection(str(error), place)


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


def _check_columns(required: list[str], fields: Mapping[str, Any], place: str) -> None:
    columns = list(fields)
    for name in required:
        if name in columns:
            continue
        nearest = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
        raise ConfigError(
            f"{place}: no column {name!r}. The columns are {', '.join(map(repr, columns)) or 'none'}. "
            + (f"Did you mean {nearest[0]!r}? " if nearest else "")
            + "Set config.data.prompt_field (or prompt_template), completion_field and label_field."
        )


def _record(fields: Mapping[str, Any], prompt_fields: list[str], data: DataConfig, place: str) -> Feedback | Skipped:
    desirable = _label(fields, data)
    if desirable is None:
        return Skipped(place)
    if data.prompt_template:
        # format_map with the named fields alone: the template cannot reach anything else.
        values = {name: _present(fields, name) for name in prompt_fields}
        prompt: Any = _text(data.prompt_template.format_map(values), "prompt")
    else:
        prompt = _prompt(_present(fields, data.prompt_field))
    completion = _completion(_present(fields, data.completion_field))
    return Feedback(prompt, completion, desirable, _weight(fields.get(data.weight_field)), place)


def _present(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise _BadRowError(f"missing field {name!r}")
    if fields[name] is None:
        raise _BadRowError(f"null field {name!r}")
    return fields[name]


def _label(fields: Mapping[str, Any], data: DataConfig) -> bool | None:
    value = _present(fields, data.label_field)
    if isinstance(value, bool | str | int | float) and str(value) in data.label_map:
        return data.label_map[str(value)]
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        raise _BadRowError(f"label is not mapped: {str(value)[:40]!r}")
    raise _BadRowError(f"label is not a boolean, text or number but {type(value).__name__}")


def _weight(value: Any) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise _BadRowError(f"weight is not a finite number of at least 0: {str(value)[:40]!r}")
    return weight


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"{name} is not text but {type(value).__name__}")
    if not value.strip():
        raise _BadRowError(f"empty {name}")
    if "\0" in value:
        raise _BadRowError(f"NUL character in {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRowError(f"lone surrogate in {name}") from None
    return value


def _prompt(value: Any) -> str | list[Message]:
    if not isinstance(value, list):
        return _text(value, "prompt")
    if not value:
        raise _BadRowError("empty prompt")
    messages = [_message(message, "prompt") for message in value]
    if messages[-1]["role"] == "assistant":
        raise _BadRowError("prompt ends with an assistant message")
    if messages[-1]["role"] in ("system", "developer"):
        raise _BadRowError("prompt has no message after the system message")
    return messages


def _completion(value: Any) -> str:
    if not isinstance(value, list):
        return _text(value, "completion")
    if len(value) != 1:
        raise _BadRowError("completion is not one message" if value else "empty completion")
    message = _message(value[0], "completion")
    if message["role"] != "assistant":
        raise _BadRowError(f"completion has role {message['role']!r}, not 'assistant'")
    return message["content"]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise _BadRowError(f"message of the {name} is not an object but {type(message).__name__}")
    role = message.get("role")
    if role not in _ROLES:
        raise _BadRowError(f"role of the {name} is not known: {str(role)[:40]!r}")
    if "content" not in message:
        raise _BadRowError(f"message of the {name} has no content")
    return {"role": role, "content": _text(message["content"], name)}
