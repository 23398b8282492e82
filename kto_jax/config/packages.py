"""Packages that only some uses need: whether one is installed, and the error if it is missing."""

from __future__ import annotations

import importlib.util

from kto_jax.config.errors import ConfigError

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}
"""What pip calls a package, if that is not the name it is imported by."""


def distribution(module: str) -> str:
    """What pip calls the package that is imported as `module`."""
    return _DISTRIBUTIONS.get(module, module)


def is_installed(module: str) -> bool:
    """Whether a package is installed; does not import it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def require(module: str, use: str, otherwise: str) -> None:
    """Refuses a use whose package is missing; does not import the package.

    Args:
      module: the name it is imported by.
      use: what needs it, the subject of the error.
      otherwise: what to do without the package, after "or".

    Raises:
      ConfigError: the package is not installed; names the command that installs it.
    """
    if not is_installed(module):
        name = distribution(module)
        raise ConfigError(
            f"{use} needs the package {name}, which is not installed. kto_jax runs without {name} as long as nothing "
            f"uses it. Run pip install {name}, or {otherwise}."
        )
