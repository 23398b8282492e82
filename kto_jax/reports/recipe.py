"""Settings of a run that differ from its recipe, or from the defaults if it has none."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from kto_jax.config import Config, ConfigError, resolve, to_dict
from kto_jax.config.recipes import load

Difference = tuple[str, str, str]
"""The field, its value in the recipe, and its value in the run."""


def differences_from_recipe(command: str, config: Mapping[str, Any]) -> tuple[str, list[Difference]]:
    """What a run's configuration is compared with, and the fields that differ.

    Args:
      command: the command line, which names the recipe.
      config: the resolved configuration, nested.
    """
    name = _recipe_of(command)
    try:
        if name:
            return f"the recipe {name}", differing(to_dict(resolve(load(name)[1])), config)
    except ConfigError:  # It was moved, or needs what this machine lacks: the defaults are still there.
        pass
    return "the defaults", differing(to_dict(Config()), config)


def _recipe_of(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--config="):
            return word.removeprefix("--config=")
        if word == "--config":
            return after
    return ""


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """The fields of two nested configurations that differ, by their dotted names."""
    ours, theirs = dict(flatten(one)), dict(flatten(other))
    return [
        (name, ours.get(name, "–"), theirs.get(name, "–"))
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of (dotted name, value as JSON) of a nested mapping."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            rows.append((f"{prefix}{key}", text))
    return rows
