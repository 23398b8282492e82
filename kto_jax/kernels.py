"""Which attention a run takes, and how it lies on the mesh.

A kernel is opaque to the compiler's partitioner, and so are loops whose length the data decides. Both are run on every
device by itself, on the rows and heads that lie there: no pass of attention talks to another device.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kto_jax.config import ConfigError
from kto_jax.models.attention import dense_attention
from kto_jax.models.blockwise import BLOCK, blockwise_attention
from kto_jax.models.splash import splash_attention
from kto_jax.models.triton import triton_attention
from kto_jax.sharding import ACTIVATION_RULES, num_parts

# What "auto" takes on each platform, and where each kernel runs; the rest runs everywhere.
BEST = {"tpu": "splash", "gpu": "triton"}
PLATFORMS = {"splash": "tpu", "triton": "gpu"}
# Tokens of a block of "chunked" where there are more units to fill than on a CPU.
LARGE_BLOCK = 512
_ROWS, _HEADS = ACTIVATION_RULES["rows"], ACTIVATION_RULES["heads"]


@dataclasses.dataclass(frozen=True)
class MeshAttention:
    """Attention over packed rows that lie on a mesh: see `models.attention.dense_attention` for its arguments.

    Attributes:
      mesh: the devices; rows lie over data and fsdp, heads over tensor.
      name: "dense", "chunked", "splash" or "triton".
    """

    mesh: Mesh
    name: str

    def __call__(
        self, query: Array, key: Array, value: Array, *, segment_ids_RL: Array, positions_RL: Array, **options: Any
    ) -> Array:
        """Mixes values [R, L, K, H] by queries [R, L, N, H] and keys [R, L, K, H]."""

        def attend(query: Array, key: Array, value: Array, segment_ids: Array, positions: Array) -> Array:
            return self._attend(query, key, value, segment_ids_RL=segment_ids, positions_RL=positions, **options)

        arrays: tuple[Array, ...] = (query, key, value, segment_ids_RL, positions_RL)
        rows = query.shape[0]
        if self.mesh.size > 1 and self.name != "dense":
            # Rows that the devices cannot share equally get some of padding beside them.
            spare = -rows % num_parts(self.mesh, _ROWS)
            arrays = tuple(jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
            heads, tokens = PartitionSpec(_ROWS, None, _HEADS, None), PartitionSpec(_ROWS, None)
            attend = jax.shard_map(
                attend, mesh=self.mesh, in_specs=(heads, heads, heads, tokens, tokens), out_specs=heads, check_vma=False
            )
        return attend(*arrays)[:rows]

    def _attend(self, *heads: Array, window=None, softcap=None, precision=None, **options: Any) -> Array:
        if self.name == "triton" and window is None and softcap is None and heads[0].dtype == jnp.bfloat16:
            return triton_attention(*heads, **options)
        options |= {"window": window, "softcap": softcap, "precision": precision}
        if self.name == "splash":
            return splash_attention(*heads, **options)
        if self.name == "dense":
            return dense_attention(*heads, **options)
        block = BLOCK if self.mesh.devices.flat[0].platform == "cpu" else LARGE_BLOCK
        return blockwise_attention(*heads, block=block, **options)


def choose_attention(name: Literal["auto", "dense", "chunked", "splash", "triton"], mesh: Mesh) -> MeshAttention:
    """The attention that a model upon this mesh takes.

    "auto" is splash on TPU, triton on GPU and chunked elsewhere. Where triton was chosen, what its kernel does not know
    (windows, soft-caps, other dtypes than bfloat16) is left to chunked.

    Raises:
      ConfigError: the mesh's devices cannot run it.
    """
    platform = mesh.devices.flat[0].platform
    chosen: str = BEST.get(platform, "chunked") if name == "auto" else name
    if PLATFORMS.get(chosen, platform) != platform:
        raise ConfigError(
            f"config.model.attention={chosen!r} is a kernel for {PLATFORMS[chosen]} devices, and these are {platform}. "
            f"Allowed here: auto, dense, chunked{f', {BEST[platform]}' if platform in BEST else ''}. "
            "Set config.model.attention."
        )
    return MeshAttention(mesh, chosen)
