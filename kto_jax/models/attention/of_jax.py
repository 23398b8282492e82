"""The attention kernels that come with JAX, imported only when a run uses them."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import jax


@functools.cache
def kernels_of_jax(name: str) -> ModuleType:
    """A module of `jax.experimental.pallas.ops`, such as gpu.attention.

    Raises:
      ImportError: this JAX lacks it.
    """
    with warnings.catch_warnings():
        # Those for GPUs are deprecated since JAX 0.11. No action is needed: without them, a run falls back.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.{name}")


def why_jax_lacks(name: str) -> str:
    """Why such a module cannot be imported; empty if it can."""
    try:
        kernels_of_jax(name)
    except ImportError:
        return f"JAX {jax.__version__} does not have it"
    return ""
