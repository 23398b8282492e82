"""The device mesh, and the rules that map logical axes to its axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.models.quantised import BLOCKS

MeshAxes = str | tuple[str, ...] | None
# From the widest network to the nearest neighbours.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")

# Logical axis -> mesh axis. A parameter's "embed" axis is sharded over fsdp, expert and sequence, and all-gathered
# where it is used; experts stay on their devices. An activation's rows are sharded over data, fsdp and expert and its
# length over sequence, so its "embed" axis stays whole.
PARAMETER_RULES: dict[str, MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "sequence"),
    "experts": "expert",
    "expert_embed": ("fsdp", "sequence"),
    "router": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "adapter": None,
}
ACTIVATION_RULES: dict[str, MeshAxes] = {
    "rows": ("data", "fsdp", "expert"),
    "length": "sequence",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "router": None,
    # Vectors that the embedding returns, before they are sharded by rows: first sharded as the table is, then with
    # their length over sequence and "embed" over the others only.
    "looked_up": "data",
    "table_embed": PARAMETER_RULES["embed"],
    "half_embed": ("fsdp", "expert"),
    # Of a KV cache, beside rows, kv_heads and head_dim.
    "layers": None,
    "slots": None,
}


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Size of each mesh axis, with -1 filled in.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and num_devices % fixed == 0:
        sizes = {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"config.mesh={sizes} does not multiply to the {num_devices} devices here. Allowed: axes whose product is "
            f"{num_devices}, or -1 on one axis. Set config.mesh.data, fsdp, expert, sequence and tensor."
        )
    return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes, with axes data, fsdp, expert, sequence and tensor.

    With several TPU slices, only the data axis crosses slices: the other axes stay within one.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or the data axis is no multiple of the slices.
    """
    devices = devices or jax.devices()
    sizes = mesh_shape(config, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if num_slices > 1:
        return _mesh_of_slices(sizes, num_slices, devices)
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def _mesh_of_slices(sizes: dict[str, int], num_slices: int, devices: list[jax.Device]) -> Mesh:
    if sizes["data"] % num_slices:
        raise ConfigError(
            f"config.mesh.data={sizes['data']} cannot be split over {num_slices} slices. Allowed: multiples of "
            f"{num_slices}, because only the data axis may cross the network between slices. Set config.mesh.data."
        )
    within = (sizes["data"] // num_slices, *(sizes[axis] for axis in AXES[1:]))
    array = mesh_utils.create_hybrid_device_mesh(within, (num_slices, *(1 for _ in AXES[1:])), devices)
    return Mesh(array, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def shardings(mesh: Mesh, logical_axes: Any, abstract: Any) -> Any:
    """A NamedSharding for every leaf of a parameter tree.

    Args:
      mesh: the devices.
      logical_axes: nested dict of tuples of logical axis names.
      abstract: the same nested dict of shapes.

    Raises:
      ConfigError: a mesh axis does not divide a dimension; the message names the leaf and the dimension.
    """

    def one(path: Any, leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
        rules = [_rule(mesh, size, axis) for size, axis in zip(leaf.shape, axes, strict=True)]
        for size, axis, rule in zip(leaf.shape, axes, rules, strict=True):
            parts = num_parts(mesh, rule)
            if size % parts:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                along = " × ".join(each for each in _names(rule) if mesh.shape[each] > 1)
                raise ConfigError(
                    f"{name} has {axis}={size}, which cannot be split over {parts} devices ({size} % {parts} = "
                    f"{size % parts}). Allowed: sizes of mesh axis {along} that divide {size}. Set config.mesh.{along}."
                )
        return NamedSharding(mesh, PartitionSpec(*rules))

    return jax.tree_util.tree_map_with_path(one, abstract, logical_axes)


def _rule(mesh: Mesh, size: int, axis: str) -> MeshAxes:
    """The mesh axes of a parameter's axis; none for scales of blocks that they cannot divide."""
    rule = PARAMETER_RULES[axis.removesuffix(BLOCKS)]
    return None if axis.endswith(BLOCKS) and size % num_parts(mesh, rule) else rule


def num_parts(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    """Number of parts into which these mesh axes split a dimension."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def row_parts(sizes: Mapping[str, int]) -> int:
    """Number of parts into which a mesh of these sizes divides the rows of a microbatch."""
    return sizes["data"] * sizes["fsdp"] * sizes["expert"]


def check_rows(microbatch_rows: int, sizes: dict[str, int]) -> None:
    """Refuses a microbatch whose rows the mesh cannot divide.

    Raises:
      ConfigError: naming the nearest number of rows that works.
    """
    parts = row_parts(sizes)
    axes = "data × fsdp × expert" if sizes["expert"] > 1 else "data × fsdp"
    if sizes["sequence"] > 1 and microbatch_rows != parts:
        raise ConfigError(
            f"config.microbatch_rows={microbatch_rows} does not go with config.mesh.sequence={sizes['sequence']}, "
            f"whose devices share one row at a time. Allowed: mesh {axes} = {parts}. "
            f"Set config.microbatch_rows to {parts}."
        )
    if microbatch_rows % parts:
        raise ConfigError(
            f"config.microbatch_rows={microbatch_rows} cannot be split over {parts} devices ({microbatch_rows} % "
            f"{parts} = {microbatch_rows % parts}). Allowed: multiples of mesh {axes} = {parts}. "
            f"Set config.microbatch_rows to {-(-microbatch_rows // parts) * parts}."
        )


def check_lengths(row_lengths: Sequence[int], sizes: dict[str, int]) -> None:
    """Refuses rows whose length the sequence axis does not divide: each of its devices would read all tokens.

    Raises:
      ConfigError: naming the nearest length that works.
    """
    parts = sizes["sequence"]
    for length in row_lengths:
        if length % parts:
            raise ConfigError(
                f"rows of {length} tokens cannot be split over config.mesh.sequence={parts} ({length} % {parts} = "
                f"{length % parts}). Allowed: multiples of {parts}. "
                f"Set config.row_length to {-(-length // parts) * parts}."
            )


def check_heads(num_heads: int, num_kv_heads: int, sizes: dict[str, int]) -> None:
    """Refuses a tensor axis that would split a head, and a sequence axis with too few heads to exchange.

    Raises:
      ConfigError: naming what does not divide.
    """
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if value % sizes["tensor"]:
            raise ConfigError(
                f"config.mesh.tensor={sizes['tensor']} cannot split the model's {name}={value} ({value} % "
                f"{sizes['tensor']} = {value % sizes['tensor']}). Allowed: common divisors of num_heads={num_heads} "
                f"and num_kv_heads={num_kv_heads}. Set config.mesh.tensor."
            )
    group, local = num_heads // num_kv_heads, num_kv_heads // sizes["tensor"]
    if group % copies_of_kv_heads(local, sizes["sequence"]):
        raise ConfigError(
            f"config.mesh.sequence={sizes['sequence']} cannot divide the {group * local} query and {local} key heads "
            f"of a device: attention gives each device of the axis whole heads. Allowed: divisors of {local}, and "
            f"multiples of {local} that divide {group * local}. Set config.mesh.sequence, or a smaller "
            "config.mesh.tensor."
        )


def check_experts(num_experts: int, sizes: Mapping[str, int]) -> None:
    """Refuses an expert axis that cannot divide the experts of a layer.

    Raises:
      ConfigError: the model has no experts, or not a multiple of the axis.
    """
    parts = sizes["expert"]
    if parts == 1 or (num_experts and num_experts % parts == 0):
        return
    if not num_experts:
        raise ConfigError(
            f"config.mesh.expert={parts}, and the model has no experts. Allowed: 1, for a model that is no mixture of "
            "experts. Set config.mesh.fsdp instead."
        )
    raise ConfigError(
        f"config.mesh.expert={parts} cannot divide the model's {num_experts} experts ({num_experts} % {parts} = "
        f"{num_experts % parts}). Allowed: divisors of {num_experts}. Set config.mesh.expert."
    )


def copies_of_kv_heads(num_kv_heads: int, sequence: int) -> int:
    """How often each key and value head is repeated so that the devices of the sequence axis get equally many."""
    return sequence // math.gcd(num_kv_heads, sequence)


@functools.cache
def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str, ...]], jax.Array]:
    """The function that a model calls to shard an activation by logical axis names.

    It is the same one for equal meshes, so that models on them are equal, and programs of one serve the other.

    A length that the sequence axis does not divide, such as the one token of a decoding step, is not sharded.
    """

    def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        rules = (
            None if axis == "length" and size % num_parts(mesh, ACTIVATION_RULES[axis]) else ACTIVATION_RULES[axis]
            for size, axis in zip(x.shape, axes, strict=True)
        )
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*rules)))

    return constrain


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch's arrays [M, R, ...]: rows over data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(None, ACTIVATION_RULES["rows"]))


def local_rows(mesh: Mesh, num_rows: int) -> slice:
    """Which of the rows of every microbatch this process places.

    Raises:
      ConfigError: they are not contiguous: the mesh interleaves the processes' devices.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, num_rows)).values()
    ranges = sorted({index[1].indices(num_rows)[:2] for index in indices if index is not None})
    first, last = ranges[0][0], ranges[-1][1]
    if sum(stop - start for start, stop in ranges) != last - first:
        raise ConfigError(
            f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} rows {ranges}. Each process must have "
            "contiguous rows. Change the axes: config.mesh.data × fsdp × expert must be a multiple of the number of "
            "processes."
        )
    return slice(first, last)


def abstract_batch(mesh: Mesh, batch: Any) -> Any:
    """Shapes, dtypes and shardings that `place_batch` gives a whole batch (NumPy arrays)."""
    rows, scalar = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def describe(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=scalar if x.ndim == 0 else rows)

    return jax.tree.map(describe, batch)


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Places this process's rows of a batch (NumPy arrays) on its devices as part of the global batch."""
    rows, scalar = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(scalar if x.ndim == 0 else rows, x)

    return jax.tree.map(place, batch)
