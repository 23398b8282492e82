"""Adapters of a folder attached to parameters that are in memory, so that several share one base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kto_jax.config import ConfigError
from kto_jax.models.families import FAMILIES
from kto_jax.models.lora import AdaptedMatrix, Adapter, DoraAdapter
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.adapter_folder import (
    AdapterFolder,
    LowRank,
    check_base,
    read_adapter_folder,
    without_tied_head,
)
from kto_jax.models.weights.tensors import expected_tensors

Place = tuple[int, ...]


def attach_adapters(model: Model, params: Params, path: Path, base: str) -> Params:
    """Parameters with a folder's adapters; all that these leave alone is shared with `params`.

    Args:
      model: the base.
      params: its parameters, as arrays.
      path: the folder.
      base: what the base is called in a message.

    Raises:
      ConfigError: the folder holds no adapters that are read, or those of another base.
    """
    folder, tensors = read_adapter_folder(path), FAMILIES[model.config.family].tensors
    if model.config.tied_head:
        folder = without_tied_head(folder, tensors["embed.table"].name, tensors["head.weight"].name)
    expected = expected_tensors(model.config)
    check_base({name: one.shape for name, one in expected.items()}, base, folder)
    leaves = _with_whole(model, params, folder)
    found: dict[str, dict[Place, LowRank]] = {}
    for name, pair in folder.adapters.items():
        for part in expected[name].parts:
            rows = slice(None) if part.rows is None else part.rows.places(0, part.size)
            magnitude = None if pair.magnitude is None else pair.magnitude[rows]
            own = LowRank(pair.a, pair.b[rows], pair.scale, magnitude)
            found.setdefault(part.parameter, {})[expected[name].place] = own
    for parameter, pairs in found.items():
        frozen = leaves.get(parameter, _leaf(params, parameter))
        if isinstance(frozen, AdaptedMatrix):
            raise ConfigError(
                f"{base} has adapters of its own, to which those of {path} cannot be added. Adapters are added to a "
                "whole model. Give its base as --model, or export it first (python -m kto_jax.export)."
            )
        leaves[parameter] = _adapted(frozen, pairs)
    return _replaced(params, leaves)


def _with_whole(model: Model, params: Params, folder: AdapterFolder) -> dict[str, Any]:
    """The parameters of which the folder holds whole tensors, by name."""
    expected = expected_tensors(model.config)
    leaves: dict[str, Any] = {}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return folder.whole[name][index]

    for name in folder.whole:
        for part in expected[name].parts:
            leaf = leaves.get(part.parameter, _leaf(params, part.parameter))
            place = expected[name].place
            own = part.read(read, place, tuple(slice(0, size) for size in leaf.shape[len(place) :]))
            changed = leaf.at[place].set(own) if place else jnp.asarray(own, leaf.dtype)
            leaves[part.parameter] = jax.device_put(changed, leaf.sharding)
    return leaves


def _adapted(frozen: Array, pairs: Mapping[Place, LowRank]) -> AdaptedMatrix:
    """A parameter with the adapters of its layers and experts; 0 where there is none, and up to the largest rank."""
    *stacked, size_in, size_out = frozen.shape
    rank = max(len(pair.a) for pair in pairs.values())
    a = np.zeros((*stacked, size_in, rank), np.float32)
    b = np.zeros((*stacked, rank, size_out), np.float32)
    for place, pair in pairs.items():
        a[place][:, : len(pair.a)] = pair.a.T
        b[place][: len(pair.a)] = pair.scale * pair.b.T
    if all(pair.magnitude is None for pair in pairs.values()):
        return AdaptedMatrix(frozen, Adapter(jnp.asarray(a), jnp.asarray(b)), 1.0)
    # Where there is no adapter, the norm stays what it is.
    magnitude = np.array(jnp.linalg.norm(frozen.astype(jnp.float32), axis=-2))
    for place, pair in pairs.items():
        magnitude[place] = pair.magnitude
    return AdaptedMatrix(frozen, DoraAdapter(jnp.asarray(a), jnp.asarray(b), jnp.asarray(magnitude)), 1.0)


def _leaf(params: Params, parameter: str) -> Any:
    for name in parameter.split("."):
        params = params[name]
    return params


def _replaced(params: Params, leaves: Mapping[str, Any], prefix: str = "") -> Params:
    """The tree with other leaves in some places; `params` stays as it is."""
    return {
        name: _replaced(node, leaves, f"{prefix}{name}.") if isinstance(node, dict) else leaves.get(prefix + name, node)
        for name, node in params.items()
    }
