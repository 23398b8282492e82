"""The value head of a run in a file of its own: transformers' models have no place for it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kto_jax.config import ConfigError
from kto_jax.storage.atomic import new_file

FILE = "value_head.safetensors"


def save_value_head(path: Path, head: dict[str, Any]) -> None:
    """Writes a head.

    Args:
      path: the file.
      head: its parameters on the host, nested as `init_scalar_head` nests them, and those of its own trunk.
    """
    leaves = jax.tree_util.tree_leaves_with_path(head)
    named = {".".join(key.key for key in keys): np.array(leaf, np.float32, order="C") for keys, leaf in leaves}
    with new_file(path) as partial:
        safetensors.numpy.save_file(named, partial)


def load_value_head(path: Path) -> dict[str, Any]:
    """Reads a head that `save_value_head` wrote.

    Raises:
      ConfigError: the file is missing or damaged.
    """
    try:
        named = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. It holds the value head that a round ended with. Copy it back, or "
            "train in another --workdir."
        ) from None
    head: dict[str, Any] = {}
    for name, values in named.items():
        *layers, part = name.split(".")
        functools.reduce(lambda node, layer: node.setdefault(layer, {}), layers, head)[part] = jnp.asarray(values)
    return head
