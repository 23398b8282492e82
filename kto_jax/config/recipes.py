"""Config files: finding one by its name, and running it."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kto_jax.config.errors import ConfigError
from kto_jax.config.names import nearest


def folder() -> Path:
    """The recipes: configs/ of a checkout, which a wheel holds as kto_jax/recipes."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def find(name: str) -> Path:
    """The config file that `--config=NAME` means: the path of a file, or the name of a recipe.

    Raises:
      ConfigError: there is none; names the nearest recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipe = folder() / f"{name.removesuffix('.py')}.py"
    if path.name == name and recipe.is_file():
        return recipe
    problem = "is a folder" if path.is_dir() else "does not exist"
    names = sorted(file.stem for file in folder().glob("*.py"))
    raise ConfigError(
        f"--config={name} {problem}. {nearest(path.stem, names)} Write --config=NAME of one of these recipes, or "
        "--config=PATH of a config file."
    )


def load(given: str) -> tuple[Path, dict[str, Any]]:
    """Runs a config file.

    Args:
      given: its path or the recipe's name; a text after a colon is passed to its `get_config`.

    Returns:
      Its path, and the nested dict that it sets.

    Raises:
      ConfigError: there is no such file, or it fails, whatever it raises: it is a program.
    """
    name, colon, argument = given.partition(":")
    path = find(name)
    try:
        config = runpy.run_path(str(path))["get_config"](*[argument] if colon else [])
    except ConfigError:
        raise
    except Exception as error:
        reason = "it defines no get_config()" if repr(error) == "KeyError('get_config')" else f"{error}"
        raise ConfigError(
            f"--config={given} cannot be run: {type(error).__name__}: {reason}. A config file defines get_config(), "
            "which returns default_config() with fields set. Correct the file."
        ) from None
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"get_config() of {path} returns {type(config).__name__}. It must return default_config() with fields set. "
            "Correct the file."
        )
    return path, dict(values)
