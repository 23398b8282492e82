"""Rows of feedback from files: each becomes a `Feedback` or a `Preference`, or a `Rejection` with its reason and place.

`data.format` says what a row holds beside its prompt:

    thumbs            completion, label                a Feedback
    pairs             chosen, rejected                 a Preference
    scores            completion, score                a Feedback whose label is decided later, from all scores
    demonstrations    completion                       a Feedback that is desirable

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

_FORMATS = {
    "thumbs": ("completion_field", "label_field"),
    "pairs": ("chosen_field", "rejected_field"),
    "scores": ("completion_field", "score_field"),
    "demonstrations": ("completion_field",),
}
"""The fields of `DataConfig` that name what each format needs beside the prompt."""
SAME_COMPLETIONS = "chosen and rejected are the same"
"""Why a pair is rejected that teaches nothing."""
_LARGEST = 3.4e38
"""Weights and scores are kept as float32."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, slots=True)
class Feedback:
    """One completion, and what is said of it.

    Attributes:
      prompt: text, or chat messages `{"role", "content"}` of which the last is not the assistant's.
      completion: what the model is rewarded or punished for.
      desirable: thumbs-up; means nothing yet where rows hold scores.
      weight: how much the row counts, at least 0.
      place: `file:line`, from 1; of a Parquet or JSON file the row's number.
      score: rating, finite; 0 where rows hold none.
    """

    prompt: str | list[Message]
    completion: str
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
    """A row that the configuration leaves out: its label is mapped to None."""

    place: str


Record = Feedback | Preference | Rejection | Skipped


def completions_of(record: Feedback | Preference) -> tuple[Feedback, ...]:
    """The completions of a row, in the order in which the index holds them."""
    return (record.chosen, record.rejected) if isinstance(record, Preference) else (record,)


class _BadRowError(ValueError):
    """The row is rejected; the message is the reason."""


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
    """Turns raw rows into records.

    Args:
      rows: place and fields; a `Rejection` in place of the fields where the row could not be read.
      data: which fields hold what.

    Yields:
      Every row, as `Feedback`, `Preference`, `Rejection` or `Skipped`.

    Raises:
      ConfigError: the first readable row lacks a field, or `data.prompt_template` is not usable.
    """
    prompt_fields = template_fields(data.prompt_template) if data.prompt_template else [data.prompt_field]
    required = [*prompt_fields, *(getattr(data, name) for name in _FORMATS[data.format])]
    seen_header = False
    for place, fields in rows:
        if isinstance(fields, Rejection):
            yield fields
            continue
        if not isinstance(fields, Mapping):
            yield Rejection(f"row is not an object but {type(fields).__name__}", place)
            continue
        if not seen_header:
            _check_columns(required, fields, data.format, place)
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


def _check_columns(required: list[str], fields: Mapping[str, Any], kind: str, place: str) -> None:
    columns = list(fields)
    *others, last = "prompt_field (or prompt_template)", *_FORMATS[kind]
    for name in required:
        if name in columns:
            continue
        nearest = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
        raise ConfigError(
            f"{place}: no column {name!r}. The columns are {', '.join(map(repr, columns)) or 'none'}. "
            + (f"Did you mean {nearest[0]!r}? " if nearest else "")
            + f"Set config.data.{', '.join(others)} and {last}; or config.data.format, which is {kind!r}."
        )


def _record(
    fields: Mapping[str, Any], prompt_fields: list[str], data: DataConfig, place: str
) -> Feedback | Preference | Skipped:
    desirable = _label(fields, data) if data.format == "thumbs" else data.format == "demonstrations"
    if desirable is None:
        return Skipped(place)
    if data.prompt_template:
        # format_map with the named fields alone: the template cannot reach anything else.
        values = {name: _present(fields, name) for name in prompt_fields}
        prompt: Any = _text(data.prompt_template.format_map(values), "prompt")
    else:
        prompt = _prompt(_present(fields, data.prompt_field))
    weight = _weight(fields.get(data.weight_field))
    if data.format == "pairs":
        chosen, rejected = (
            _completion(_present(fields, field), name)
            for field, name in ((data.chosen_field, "chosen"), (data.rejected_field, "rejected"))
        )
        if chosen == rejected:
            raise _BadRowError(SAME_COMPLETIONS)
        return Preference(
            Feedback(prompt, chosen, True, weight, place), Feedback(prompt, rejected, False, weight, place)
        )
    completion = _completion(_present(fields, data.completion_field), "completion")
    score = _score(_present(fields, data.score_field)) if data.format == "scores" else 0.0
    return Feedback(prompt, completion, desirable, weight, place, score)


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
    weight = 1.0 if value is None or value == "" else _number(value)
    if weight is None or weight < 0:
        raise _BadRowError(f"weight is not a finite number of at least 0: {str(value)[:40]!r}")
    return weight


def _score(value: Any) -> float:
    score = _number(value)
    if score is None:
        raise _BadRowError(f"score is not a finite number: {str(value)[:40]!r}")
    return score


def _number(value: Any) -> float | None:
    """A finite number from a number or text, or None."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None


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


def _completion(value: Any, name: str) -> str:
    if not isinstance(value, list):
        return _text(value, name)
    if len(value) != 1:
        raise _BadRowError(f"{name} is not one message" if value else f"empty {name}")
    message = _message(value[0], name)
    if message["role"] != "assistant":
        raise _BadRowError(f"{name} has role {message['role']!r}, not 'assistant'")
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
