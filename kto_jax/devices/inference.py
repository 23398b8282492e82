"""The devices of commands that only read a model: one of them, or all of this machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.attention_on_mesh import choose_attention, choose_decoding, make_layout
from kto_jax.devices.chips import find_chip
from kto_jax.devices.sharding import ACTIVATION_RULES, check_heads, make_mesh, mesh_shape, num_parts, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model, Params

Devices = Literal["auto", "one", "all"]
_SHARE_OF_WEIGHTS = 0.5
"""Of a device's memory, the share that weights may take before they are split further; the rest is for the cache."""


class Placed(NamedTuple):
    """A model and where its parameters are.

    Attributes:
      model: the model, which shards its activations over the devices.
      shardings: as its parameters; None for one device.
    """

    model: Model
    shardings: Any

    def place(self, params: Params) -> Params:
        """Parameters that one device read, on the devices of the model."""
        if self.shardings is None:
            return params
        return {name: jax.device_put(params[name], self.shardings[name]) for name in self.shardings}


def place_model(
    config: TransformerConfig,
    *,
    dtype: str,
    devices: Devices = "one",
    scalar_head: Literal["none", "reward"] = "none",
    available: Sequence[jax.Device] | None = None,
) -> Placed:
    """Builds a model for the devices that it will be read on.

    Heads and vocabulary are split over as many devices as can share them equally, and rows over the others. If a
    device's part of the weights would fill more than half of its memory, they are split over the others too, which
    gather each layer when it is used.

    Args:
      config: the architecture.
      dtype: of the parameters and of the computation.
      devices: "one", "all" of this process, or "auto": all if they are no CPUs.
      scalar_head: "reward" for a reward model.
      available: the devices; those of this process by default.
    """
    found = list(available or jax.local_devices())
    if devices == "auto":
        devices = "one" if found[0].platform == "cpu" else "all"
    how: dict[str, Any] = {"dtype": dtype, "remat": "none", "scalar_head": scalar_head}
    if devices == "one" or len(found) == 1:
        mesh = make_mesh(MeshConfig(), found[:1])
        layout = Layout(attention=choose_attention("auto", mesh), cached_attention=choose_decoding("auto", mesh))
        return Placed(Model.create(config, **how, layout=layout), None)
    mesh = make_mesh(_divide(Model.create(config, **how), dtype, found), found)
    model = Model.create(config, **how, layout=make_layout(mesh))
    return Placed(model, shardings(mesh, model.logical_axes(dtype), model.abstract_params(dtype)))


def parts_of_rows(params: Params) -> int:
    """Number of parts into which the devices that hold some parameters divide rows."""
    sharding = jax.tree.leaves(params)[0].sharding
    return num_parts(sharding.mesh, ACTIVATION_RULES["rows"]) if isinstance(sharding, NamedSharding) else 1


def whole_parts(num_rows: int, params: Params) -> int:
    """The next number of rows that the devices that hold some parameters can divide equally."""
    parts = parts_of_rows(params)
    return -(-num_rows // parts) * parts


def report_devices(placed: Placed | None) -> None:
    """Says on standard error which devices are used, if there are several.

    Args:
      placed: the model; None if its devices were not chosen.
    """
    if placed is None or jax.device_count() == 1:
        return
    if placed.shardings is None:
        print(f"uses 1 of {jax.device_count()} devices; --devices=all uses all", file=sys.stderr)
        return
    mesh: Mesh = jax.tree.leaves(placed.shardings)[0].mesh
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    print(f"uses {mesh.size} of {jax.device_count()} devices: {axes}", file=sys.stderr)


def _divide(model: Model, dtype: str, devices: list[jax.Device]) -> MeshConfig:
    """The mesh on which the most devices share the heads."""
    leaves = jax.tree.leaves(model.abstract_params(dtype))
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    chip = find_chip(devices[0].device_kind)
    room = math.inf if chip is None else _SHARE_OF_WEIGHTS * chip.hbm_bytes / chip.devices
    for tensor in range(len(devices), 0, -1):
        if len(devices) % tensor or not _can_share(model, dtype, tensor, devices):
            continue
        others = len(devices) // tensor
        wide = MeshConfig(data=1, fsdp=others, tensor=tensor)
        if others > 1 and num_bytes / tensor > room and _fits(model, dtype, wide, devices):
            return wide
        return MeshConfig(data=others, tensor=tensor)
    raise AssertionError("one device shares everything with itself")


def _can_share(model: Model, dtype: str, tensor: int, devices: list[jax.Device]) -> bool:
    """Whether this many devices can share heads, feed-forward layers and vocabulary."""
    return _fits(model, dtype, MeshConfig(data=len(devices) // tensor, tensor=tensor), devices)


def _fits(model: Model, dtype: str, mesh: MeshConfig, devices: list[jax.Device]) -> bool:
    """Whether every dimension can be split over a mesh."""
    try:
        check_heads(model.config.num_heads, model.config.num_kv_heads, mesh_shape(mesh, len(devices)))
        shardings(make_mesh(mesh, devices), model.logical_axes(dtype), model.abstract_params(dtype))
    except ConfigError:
        return False
    return True
