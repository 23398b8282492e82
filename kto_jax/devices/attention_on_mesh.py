"""Chooses a run's attention kernel, and shards it over the mesh.

The compiler's partitioner cannot split a kernel, nor a loop whose length depends on the data. Both run inside
`shard_map`: each device computes its own rows and heads, and no kernel communicates.

Devices that share a row (the mesh axis "sequence") each hold a part of its tokens, for all heads. All-to-alls around
attention exchange that for all tokens of a part of the heads, and back (DeepSpeed-Ulysses). Every device sends and
receives equally much, whatever the kernel and the segments. docs/design.md gives the reasons.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kto_jax.config import ConfigError
from kto_jax.devices.sharding import ACTIVATION_RULES, constrainer, copies_of_kv_heads, num_parts
from kto_jax.models.attention import splash, triton
from kto_jax.models.attention.blockwise import BLOCK, blockwise_attention
from kto_jax.models.attention.dense import dense_attention
from kto_jax.models.layout import Layout


class Kernel(NamedTuple):
    """An attention kernel for one kind of device, imported only when a run uses it.

    Attributes:
      platform: the platform that it runs on.
      attend: has the signature of `dense_attention`.
      supports: whether it can compute attention with these queries, window and soft-cap; if not, "chunked" is used.
      is_installed: whether the installed JAX includes it.
    """

    platform: str
    attend: Callable[..., Array]
    supports: Callable[..., bool]
    is_installed: Callable[[], bool]


# "auto" chooses the first kernel of the platform that is installed. "dense" and "chunked" run everywhere.
KERNELS = {
    "splash": Kernel("tpu", splash.splash_attention, splash.supports, splash.is_installed),
    "triton": Kernel("gpu", triton.triton_attention, triton.supports, triton.is_installed),
}
# Tokens per block of "chunked" on accelerators, which need more parallel work than a CPU.
LARGE_BLOCK = 512
_ROWS, _LENGTH, _HEADS = (ACTIVATION_RULES[axis] for axis in ("rows", "length", "heads"))


@dataclasses.dataclass(frozen=True)
class MeshAttention:
    """Attention over packed rows sharded over a mesh: see `models.attention.dense_attention` for its arguments.

    Attributes:
      mesh: the devices; rows are sharded over data and fsdp, their tokens over sequence, heads over tensor.
      name: "dense", "chunked", "splash" or "triton".
    """

    mesh: Mesh
    name: str

    def __call__(
        self, query: Array, key: Array, value: Array, *, segment_ids_RL: Array, positions_RL: Array, **options: Any
    ) -> Array:
        """Attention of queries [R, L, N, H] over keys and values [R, L, K, H]."""

        def attend(query: Array, key: Array, value: Array, segment_ids: Array, positions: Array) -> Array:
            heads = (_whole_rows(x, sequence) for x in (query, key, value))
            mixed = self._attend(*heads, segment_ids_RL=segment_ids, positions_RL=positions, **options)
            return _part_of_rows(mixed, sequence)

        arrays: tuple[Array, ...] = (query, key, value, segment_ids_RL, positions_RL)
        rows, length = query.shape[:2]
        sequence = num_parts(self.mesh, _LENGTH)
        if self.mesh.size > 1 and (self.name != "dense" or sequence > 1):
            # If the devices cannot share rows and tokens equally, padding is added.
            spare = ((0, -rows % num_parts(self.mesh, _ROWS)), (0, -length % sequence))
            arrays = tuple(jnp.pad(x, [*spare] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
            heads, tokens = PartitionSpec(_ROWS, _LENGTH, _HEADS, None), PartitionSpec(_ROWS, None)
            attend = jax.shard_map(
                attend, mesh=self.mesh, in_specs=(heads, heads, heads, tokens, tokens), out_specs=heads, check_vma=False
            )
        return attend(*arrays)[:rows, :length]

    def _attend(self, *heads: Array, window: int | None = None, softcap: float | None = None, **options: Any) -> Array:
        options |= {"window": window, "softcap": softcap}
        kernel = KERNELS.get(self.name)
        if kernel is not None and kernel.supports(heads[0], window=window, softcap=softcap):
            return kernel.attend(*heads, **options)
        if self.name == "dense":
            return dense_attention(*heads, **options)
        block = BLOCK if self.mesh.devices.flat[0].platform == "cpu" else LARGE_BLOCK
        return blockwise_attention(*heads, block=block, **options)


def _whole_rows(x: Array, sequence: int) -> Array:
    """[R, L / sequence, K, H] -> [R, L, K' / sequence, H]: all tokens, for this device's part of the heads.

    K' is K, or the smallest multiple of K that `sequence` divides: keys and values are then repeated.
    """
    if sequence == 1:
        return x
    x = jnp.repeat(x, copies_of_kv_heads(x.shape[2], sequence), axis=2)
    return jax.lax.all_to_all(x, _LENGTH, split_axis=2, concat_axis=1, tiled=True)


def _part_of_rows(x: Array, sequence: int) -> Array:
    """[R, L, N / sequence, H] -> [R, L / sequence, N, H]."""
    return x if sequence == 1 else jax.lax.all_to_all(x, _LENGTH, split_axis=1, concat_axis=2, tiled=True)


def choose_attention(name: Literal["auto", "dense", "chunked", "splash", "triton"], mesh: Mesh) -> MeshAttention:
    """Chooses the attention of a model on this mesh.

    "auto" is the kernel for the mesh's devices (splash on TPU, triton on GPU). It is chunked on other devices, and when
    the installed JAX lacks the kernel, which is logged. With triton, chunked computes what the kernel cannot: windows,
    soft-caps and dtypes other than bfloat16.

    Raises:
      ConfigError: the mesh's devices cannot run it, or the installed JAX lacks it.
    """
    if name in ("dense", "chunked"):
        return MeshAttention(mesh, name)
    platform = mesh.devices.flat[0].platform
    known = [kernel for kernel in KERNELS if KERNELS[kernel].platform == platform]
    installed = [kernel for kernel in known if KERNELS[kernel].is_installed()]
    if name in installed:
        return MeshAttention(mesh, name)
    if name == "auto":
        if known and not installed:
            _log_fallback(known[0])
        return MeshAttention(mesh, (*installed, "chunked")[0])
    reason = f"JAX {jax.__version__} does not have"
    if name not in known:
        reason = f"runs on {KERNELS[name].platform} devices, and these are {platform}"
    raise ConfigError(
        f"config.model.attention={name!r} is a kernel that {reason}. Allowed here: "
        f"{', '.join(('auto', 'dense', 'chunked', *installed))}. Set config.model.attention."
    )


def make_layout(
    mesh: Mesh,
    attention: Literal["auto", "dense", "chunked", "splash", "triton"] = "auto",
    reduce_dtype: Literal["float32", "bfloat16"] = "float32",
) -> Layout:
    """How a model on this mesh shards its activations.

    Args:
      mesh: the devices.
      attention: the kernel, as `choose_attention` takes it.
      reduce_dtype: dtype in which gradients of the layers' matrices are summed over devices.

    Raises:
      ConfigError: as `choose_attention`.
    """
    kernel = choose_attention(attention, mesh)
    return Layout(constrainer(mesh), mesh.size, num_parts(mesh, _LENGTH), kernel, reduce_dtype)


@functools.cache
def _log_fallback(kernel: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger(__name__).warning(
            'JAX %s has no kernel %r for attention; config.model.attention="auto" uses "chunked" instead',
            jax.__version__,
            kernel,
        )
