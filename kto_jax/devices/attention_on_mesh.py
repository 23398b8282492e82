"""Chooses a run's attention kernels, for packed rows and for decoding, and shards them over the mesh.

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
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kto_jax.config import ConfigError
from kto_jax.devices.chips import find_chip
from kto_jax.devices.experts_on_mesh import MeshExperts
from kto_jax.devices.sharding import ACTIVATION_RULES, constrainer, copies_of_kv_heads, num_parts
from kto_jax.losses.logprobs import KEPT_LOGITS
from kto_jax.models.attention import flash_decoding, mosaic, paged, splash, triton
from kto_jax.models.attention.blockwise import BLOCK, blockwise_attention
from kto_jax.models.attention.cached import CACHE_UNIT, cached_attention
from kto_jax.models.attention.dense import dense_attention
from kto_jax.models.layout import Layout


class Kernel(NamedTuple):
    """An attention kernel for one kind of device, imported only when a run uses it.

    Attributes:
      platform: the platform that it runs on.
      attend: has the signature of `dense_attention`; for decoding, of `cached_attention`.
      why_not: why it cannot compute attention with these queries, window and soft-cap on this device; "" if it can.
      why_missing: why it cannot be imported; "" if it can.
      cost: what it costs compared with the kernels before it in `KERNELS`.
    """

    platform: str
    attend: Callable[..., Array]
    why_not: Callable[..., str]
    why_missing: Callable[[], str]
    cost: str = ""


# In order of preference: the first kernel of the platform that is installed and supports the attention is used, and
# "chunked" if there is none. "dense" and "chunked" run everywhere.
KERNELS = {
    "splash": Kernel("tpu", splash.splash_attention, splash.why_not, splash.why_missing),
    "mosaic": Kernel("gpu", mosaic.mosaic_attention, mosaic.why_not, mosaic.why_missing),
    "triton": Kernel(
        "gpu",
        triton.triton_attention,
        triton.why_not,
        triton.why_missing,
        cost="it computes other segments and masks them, and repeats keys and values for each query head",
    ),
}
# Of one new token in each slot of a KV cache. `why_not` is also told the slots times heads of a device, and the length
# of the cache. Where none can be used, `cached_attention` is.
DECODING_KERNELS = {
    "paged": Kernel("tpu", paged.paged_attention, paged.why_not, paged.why_missing),
    "flash_decoding": Kernel("gpu", flash_decoding.flash_decoding, flash_decoding.why_not, flash_decoding.why_missing),
}
# Positions of the shortest cache that a kernel reads. A shorter one is read whole by one matmul, sooner than a kernel
# has begun with every slot and head.
SHORTEST_CACHE = 1024
COST_OF_CHUNKED = "a loop of XLA matmuls instead of a fused kernel; slower, in memory linear in the row length"
# Tokens per block of "chunked" on accelerators, which need more parallel work than a CPU.
LARGE_BLOCK = 512
COST_OF_CACHED = "XLA matmuls over the whole cache, also over positions that a completion has not reached"
_ROWS, _LENGTH, _HEADS = (ACTIVATION_RULES[axis] for axis in ("rows", "length", "heads"))


@dataclasses.dataclass(frozen=True)
class MeshAttention:
    """Attention over packed rows sharded over a mesh: see `models.attention.dense_attention` for its arguments.

    Attributes:
      mesh: the devices; rows are sharded over data, fsdp and expert, their tokens over sequence, heads over tensor.
      name: "dense", "chunked" or a kernel. A kernel is replaced wherever it lacks a feature: see `kernel_for`.
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
        name = self.kernel_for(heads[0], window=window, softcap=softcap)
        if name in KERNELS:
            return KERNELS[name].attend(*heads, **options)
        if name == "dense":
            return dense_attention(*heads, **options)
        block = BLOCK if self.mesh.devices.flat[0].platform == "cpu" else LARGE_BLOCK
        return blockwise_attention(*heads, block=block, **options)

    def kernel_for(self, query: Array, *, window: int | None, softcap: float | None) -> str:
        """The kernel that computes attention of these queries: `name`, or the next of its platform that supports them.

        A replacement is logged once, with its reason and its cost.
        """
        if self.name not in KERNELS:
            return self.name
        candidates = _of_platform(KERNELS[self.name].platform)
        candidates = candidates[candidates.index(self.name) :]
        device, reasons = self.mesh.devices.flat[0], []
        for name in candidates:
            kernel = KERNELS[name]
            reason = kernel.why_missing() or kernel.why_not(query, window=window, softcap=softcap, device=device)
            if not reason:
                break
            reasons.append(f"{name} {reason}")
        else:
            name = "chunked"
        if reasons:
            _log_fallback(name, "; ".join(reasons))
        return name


@dataclasses.dataclass(frozen=True)
class MeshDecoding:
    """Attention over a KV cache sharded over a mesh: see `models.attention.cached_attention` for its arguments.

    Attributes:
      mesh: the devices; slots are sharded over data, fsdp and expert, heads over tensor.
      name: the kernel for one new token in each slot of a long cache; "cached" for none.
    """

    mesh: Mesh
    name: str

    def __call__(self, query: Array, key: Array, value: Array, *, positions_BL: Array, **options: Any) -> Array:
        """Attention of queries [B, L, N, H] over cached keys and values [B, K, S, H]."""
        if not self.uses_kernel(query, key, **options):
            return cached_attention(query, key, value, positions_BL=positions_BL, **options)

        def attend(query: Array, key: Array, value: Array, positions: Array) -> Array:
            return DECODING_KERNELS[self.name].attend(query, key, value, positions_BL=positions, **options)

        if self.mesh.size > 1:
            queries, cache = PartitionSpec(_ROWS, None, _HEADS, None), PartitionSpec(_ROWS, _HEADS, None, None)
            attend = jax.shard_map(
                attend, mesh=self.mesh, in_specs=(queries, cache, cache, PartitionSpec(_ROWS, None)), out_specs=queries,
                check_vma=False,
            )  # fmt: skip
        return attend(query, key, value, positions_BL)

    def uses_kernel(
        self, query: Array, key: Array, *, window: int | None = None, softcap: float | None = None, **options: Any
    ) -> bool:
        """Whether the kernel decodes these queries over these keys. What it lacks is logged once.

        It does not prefill, and does not read short caches.
        """
        del options
        slots, kv_heads, length, _ = key.shape
        if self.name not in DECODING_KERNELS or query.shape[1] > 1 or length < SHORTEST_CACHE:
            return False
        kernel = DECODING_KERNELS[self.name]
        parts, head_parts = num_parts(self.mesh, _ROWS), num_parts(self.mesh, _HEADS)
        if slots % parts:
            reason = f"needs slots that {parts} devices can share equally, and there are {slots}"
        elif length % CACHE_UNIT:
            reason = f"needs a cache of a multiple of {CACHE_UNIT} positions, and this one has {length}"
        else:
            reason = kernel.why_missing() or kernel.why_not(
                query, window=window, softcap=softcap, device=self.mesh.devices.flat[0],
                sequences=slots // parts * (kv_heads // head_parts), length=length,
            )  # fmt: skip
        if reason:
            _log_cached(f"{self.name} {reason}")
        return not reason


def _of_platform(platform: str) -> list[str]:
    """Kernels of a platform, the preferred first."""
    return [name for name, kernel in KERNELS.items() if kernel.platform == platform]


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


AttentionName = Literal["auto", "dense", "chunked", "splash", "mosaic", "triton"]


def choose_attention(name: AttentionName, mesh: Mesh) -> MeshAttention:
    """Chooses the attention of a model on this mesh.

    "auto" is the first installed kernel for the mesh's devices (splash on TPU; mosaic, then triton on GPU), and chunked
    on other devices. A kernel that is passed over because it is not installed is logged.

    Raises:
      ConfigError: the mesh's devices cannot run it, or it is not installed.
    """
    if name in ("dense", "chunked"):
        return MeshAttention(mesh, name)
    platform = mesh.devices.flat[0].platform
    missing = {kernel: KERNELS[kernel].why_missing() for kernel in _of_platform(platform)}
    installed = [kernel for kernel, reason in missing.items() if not reason]
    if name in installed:
        return MeshAttention(mesh, name)
    if name == "auto":
        chosen = (*installed, "chunked")[0]
        preferred = list(missing)[: list(missing).index(chosen)] if installed else list(missing)
        if preferred:
            _log_fallback(chosen, "; ".join(f"{kernel}: {missing[kernel]}" for kernel in preferred))
        return MeshAttention(mesh, chosen)
    reason = (
        f"cannot be imported: {missing[name]}"
        if name in missing
        else (f"runs on {KERNELS[name].platform} devices, and these are {platform}")
    )
    raise ConfigError(
        f"config.model.attention={name!r} is a kernel that {reason}. Allowed here: "
        f"{', '.join(('auto', 'dense', 'chunked', *installed))}. Set config.model.attention."
    )


def choose_decoding(name: AttentionName, mesh: Mesh) -> MeshDecoding:
    """Chooses the attention of decoding: the kernel of the mesh's devices, if the model's attention is a kernel.

    Args:
      name: the attention that was asked for; "dense" and "chunked" ask for plain XLA, here too.
      mesh: the devices.
    """
    platform = mesh.devices.flat[0].platform
    found = [kernel for kernel, each in DECODING_KERNELS.items() if each.platform == platform]
    return MeshDecoding(mesh, "cached" if name in ("dense", "chunked") or not found else found[0])


def make_layout(
    mesh: Mesh,
    attention: AttentionName = "auto",
    reduce_dtype: Literal["float32", "bfloat16"] = "float32",
    keep_logits: Literal["auto", "always", "never"] = "auto",
) -> Layout:
    """How a model on this mesh shards its activations.

    Args:
      mesh: the devices.
      attention: the kernel, as `choose_attention` takes it.
      reduce_dtype: dtype in which gradients of the layers' matrices are summed over devices.
      keep_logits: whether the backward pass uses the forward pass's logits; "auto" decides by the device's memory.

    Raises:
      ConfigError: as `choose_attention`.
    """
    kernel = choose_attention(attention, mesh)
    kept_logits = {"auto": _kept_logits(mesh.devices.flat[0]), "always": sys.maxsize, "never": 0}[keep_logits]
    return Layout(
        constrain=constrainer(mesh),
        num_devices=mesh.size,
        row_parts=num_parts(mesh, _LENGTH),
        attention=kernel,
        cached_attention=choose_decoding(attention, mesh),
        run_experts=MeshExperts(mesh),
        reduce_dtype=reduce_dtype,
        kept_logits=kept_logits,
    )


def _kept_logits(device: jax.Device) -> int:
    """How many float32 logits take a sixteenth of a device's memory; the default of an unknown device."""
    chip = find_chip(device.device_kind)
    return KEPT_LOGITS if chip is None else chip.hbm_bytes // chip.devices // 16 // 4


@functools.cache
def _log_fallback(chosen: str, reasons: str) -> None:
    if jax.process_index() == 0:
        cost = KERNELS[chosen].cost if chosen in KERNELS else COST_OF_CHUNKED
        logging.getLogger(__name__).warning("attention uses %r (%s), because %s", chosen, cost, reasons)


@functools.cache
def _log_cached(reason: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger(__name__).warning("decoding attention uses 'cached' (%s), because %s", COST_OF_CACHED, reason)
