"""Which attention a run takes, and how it lies on the mesh.

A kernel is opaque to the compiler's partitioner, and so are loops whose length the data decides. Both are run on every
device by itself, on the rows and heads that lie there: no kernel talks to another device.

Devices that share a row (the mesh axis "sequence") hold a part of its tokens, for all heads. Around attention they
trade that for all of its tokens, for a part of the heads, and back: exchanges of equal parts, whatever the kernel and
the segments. docs/design.md says why.
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
      platform: where it runs.
      attend: called as `dense_attention` is.
      supports: whether it can compute attention of these queries, window and soft-cap; otherwise "chunked" does.
      is_installed: whether the installed JAX has it.
    """

    platform: str
    attend: Callable[..., Array]
    supports: Callable[..., bool]
    is_installed: Callable[[], bool]


# "auto" takes the first kernel of the platform that is installed. "dense" and "chunked" run everywhere.
KERNELS = {
    "splash": Kernel("tpu", splash.splash_attention, splash.supports, splash.is_installed),
    "triton": Kernel("gpu", triton.triton_attention, triton.supports, triton.is_installed),
}
# Tokens of a block of "chunked" where there are more units to fill than on a CPU.
LARGE_BLOCK = 512
_ROWS, _LENGTH, _HEADS = (ACTIVATION_RULES[axis] for axis in ("rows", "length", "heads"))


@dataclasses.dataclass(frozen=True)
class MeshAttention:
    """Attention over packed rows that lie on a mesh: see `models.attention.dense_attention` for its arguments.

    Attributes:
      mesh: the devices; rows lie over data and fsdp, their tokens over sequence, heads over tensor.
      name: "dense", "chunked", "splash" or "triton".
    """

    mesh: Mesh
    name: str

    def __call__(
        self, query: Array, key: Array, value: Array, *, segment_ids_RL: Array, positions_RL: Array, **options: Any
    ) -> Array:
        """Mixes values [R, L, K, H] by queries [R, L, N, H] and keys [R, L, K, H]."""

        def attend(query: Array, key: Array, value: Array, segment_ids: Array, positions: Array) -> Array:
            heads = (_whole_rows(x, sequence) for x in (query, key, value))
            mixed = self._attend(*heads, segment_ids_RL=segment_ids, positions_RL=positions, **options)
            return _part_of_rows(mixed, sequence)

        arrays: tuple[Array, ...] = (query, key, value, segment_ids_RL, positions_RL)
        rows, length = query.shape[:2]
        sequence = num_parts(self.mesh, _LENGTH)
        if self.mesh.size > 1 and (self.name != "dense" or sequence > 1):
            # Rows and tokens that the devices cannot share equally get some of padding beside them.
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

    K' is K, or the least multiple of it that can be shared out: keys and values are then written several times.
    """
    if sequence == 1:
        return x
    x = jnp.repeat(x, copies_of_kv_heads(x.shape[2], sequence), axis=2)
    return jax.lax.all_to_all(x, _LENGTH, split_axis=2, concat_axis=1, tiled=True)


def _part_of_rows(x: Array, sequence: int) -> Array:
    """[R, L, N / sequence, H] -> [R, L / sequence, N, H]."""
    return x if sequence == 1 else jax.lax.all_to_all(x, _LENGTH, split_axis=1, concat_axis=2, tiled=True)


def choose_attention(name: Literal["auto", "dense", "chunked", "splash", "triton"], mesh: Mesh) -> MeshAttention:
    """The attention that a model on this mesh uses.

    "auto" is the kernel for the mesh's devices (splash on TPU, triton on GPU), and chunked where there is none or the
    installed JAX has none, which is logged. Where triton was chosen, chunked does what its kernel cannot: windows,
    soft-caps and dtypes other than bfloat16.

    Raises:
      ConfigError: the mesh's devices cannot run it, or the installed JAX does not have it.
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


def make_layout(mesh: Mesh, attention: Literal["auto", "dense", "chunked", "splash", "triton"] = "auto") -> Layout:
    """How a model on this mesh shards its activations.

    Raises:
      ConfigError: as `choose_attention`.
    """
    return Layout(constrainer(mesh), mesh.size, num_parts(mesh, _LENGTH), choose_attention(attention, mesh))


@functools.cache
def _log_fallback(kernel: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger(__name__).warning(
            'JAX %s has no kernel %r for attention; config.model.attention="auto" uses "chunked" instead',
            jax.__version__,
            kernel,
        )
