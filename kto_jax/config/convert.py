"""Values of single fields: from the text of a flag or the objects of a config file to the field's type."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

from kto_jax.config.data_fields import SOURCE_FIELDS, DataConfig, SourceWeight
from kto_jax.config.errors import ConfigError
from kto_jax.config.names import closest, nearest
from kto_jax.config.ranges import base, choices, describe, number_range, options


class _MismatchError(Exception):
    """A value is not of a type."""


def hints(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass, with its range."""
    return typing.get_type_hints(kind, include_extras=True)


def parse(text: str, hint: Any) -> Any:
    """What a flag's text stands for in a field of this type: `1e-5` a number, `(1, 2)` a tuple, `name` a text.

    `convert` then checks the type.
    """
    kinds = [typing.get_origin(base(option)) or base(option) for option in options(hint)]
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if str in kinds and not text.startswith(("(", "[", "{")):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the field's type, if that loses nothing.

    Args:
      value: what was given.
      hint: the type, which may be `Annotated` with a `Range`.
      path: the field's name in errors.

    Raises:
      ConfigError: it is of another type or out of range.
    """
    for option in options(hint):
        try:
            return _as(value, option, path)
        except _MismatchError:
            continue
    known = [choice for choice in choices(hint) if isinstance(choice, str)]
    texts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    unknown = [text for text in texts if isinstance(text, str) and text.strip() not in known]
    close = closest(unknown[0], known) if unknown else None
    meant = f'Did you mean "{close}"? ' if close else ""
    raise ConfigError(f"{path}={value!r} cannot be used. {meant}Allowed: {describe(hint)}. Correct {path}.")


def _as(value: Any, option: Any, path: str) -> Any:
    kind, bounds = base(option), number_range(option)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _require(value, any(value == allowed and type(value) is type(allowed) for allowed in choices(kind)))
    if origin is tuple:
        return _as_tuple(value, typing.get_args(kind)[0], path)
    if origin is collections.abc.Mapping:
        return {str(name): _as_any(each, typing.get_args(kind)[1], path) for name, each in _mapping(value).items()}
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return _require(value, type(value) is kind and (bounds is None or value in bounds))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return _require(value, isinstance(value, Mapping))


def _as_any(value: Any, hint: Any, path: str) -> Any:
    """`value` as any of a type's alternatives."""
    if hint is Any:
        return value
    for option in options(hint):
        with contextlib.suppress(_MismatchError):
            return None if option is type(None) and value is None else _as(value, option, path)
    raise _MismatchError


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise _MismatchError
    return value


def _as_tuple(value: Any, item: Any, path: str) -> tuple[Any, ...]:
    if options(item) != (item,):  # sources: texts and mappings
        entries = [value] if isinstance(value, Mapping) else _require(value, isinstance(value, (tuple, list)))
        return tuple(_source(entry, f"{path}[{i}]") for i, entry in enumerate(entries))
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return tuple(_as(entry, item, path) for entry in _require(value, isinstance(value, (tuple, list))))


def _source(entry: Any, path: str) -> str | dict[str, Any]:
    """An entry of data.train or data.eval.

    Raises:
      ConfigError: it is neither a source nor a mapping of the fields that a source may have.
    """
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping) or not entry.get("source"):
        raise ConfigError(
            f"{path}={entry!r} names no source. Allowed: text, or a mapping of source, weight and how its records are "
            f'read. Write {path} as {{"source": "feedback.jsonl"}}.'
        )
    of_data = hints(DataConfig)
    allowed = {"source": str, "weight": SourceWeight} | {name: of_data[name] for name in SOURCE_FIELDS}
    for name in entry:
        if name not in allowed:
            remedy = f"Set config.data.{name} for all sources." if name in of_data else f"Correct {path}."
            raise ConfigError(f"{path}.{name} is not a field of a source. {nearest(str(name), allowed)} {remedy}")
    return {name: convert(value, allowed[name], f"{path}.{name}") for name, value in entry.items()}


def is_section(hint: Any) -> TypeGuard[type]:
    """Whether a type is a section of the configuration."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)
