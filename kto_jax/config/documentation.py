"""The documentation of fields at run time: the texts below them in their source, and the table that `--help` prints."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from kto_jax.config.convert import hints, is_section
from kto_jax.config.fields import Config
from kto_jax.config.ranges import describe, options

_WIDTH = 80


def documentation(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found, body = {}, definition.body
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def table(kind: type, prefix: str) -> str:
    """All flags of a dataclass: name, type, range, default and documentation of each, on 80 columns.

    Args:
      kind: the dataclass; fields that are a section of the configuration are left out.
      prefix: of the flags, such as `--config.`.
    """
    return "\n".join(_entries(kind, prefix))


def config_table() -> str:
    """All fields of a configuration, section by section."""
    parts = [table(Config, "--config.")]
    for name, hint in hints(Config).items():
        if is_section(hint):
            about = textwrap.fill(" ".join(inspect.getdoc(hint).split()), _WIDTH)  # type: ignore[union-attr]
            parts.append(f"{name.upper()}\n{about}\n\n{table(hint, f'--config.{name}.')}")
    return "\n\n".join(parts)


def _entries(kind: type, prefix: str) -> Iterator[str]:
    texts = documentation(kind)
    for field in dataclasses.fields(kind):
        hint = hints(kind)[field.name]
        if any(is_section(option) for option in options(hint)) and kind is Config:
            continue
        facts = f"{describe(hint)}{_default(field)}"
        yield f"  {prefix}{field.name}"
        yield textwrap.fill(facts, _WIDTH, initial_indent="      [", subsequent_indent="       ") + "]"
        yield textwrap.fill(texts[field.name], _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "; default: none" if field.default_factory is not dataclasses.MISSING else "; required"
    value: Any = field.default
    if isinstance(value, tuple):
        return f"; default: {','.join(value)}" if value else "; default: none"
    return "; default: empty" if value == "" else f"; default: {value}"
