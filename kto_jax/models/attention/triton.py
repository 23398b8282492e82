"""Flash attention over packed rows on NVIDIA GPUs: the Pallas kernel that comes with JAX, compiled by Triton.

JAX 0.11 deprecated this kernel. It is imported only when a run uses it; `why_missing` says whether this JAX still
includes it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.attention.of_jax import kernels_of_jax, why_jax_lacks

BLOCK = 128

_kernel = functools.partial(kernels_of_jax, "gpu.attention")
why_missing = functools.partial(why_jax_lacks, "gpu.attention")
"""Why the kernel cannot be imported; empty if it can."""


def why_not(query: Array, *, window: int | None, softcap: float | None, device: Any) -> str:
    """Why the kernel cannot compute this attention on this device; empty if it can."""
    if query.dtype != jnp.bfloat16:
        return f"needs bfloat16, and queries are {query.dtype}"
    if window is not None or softcap is not None:
        return f"has no windows and no soft-caps, and this layer has window {window} and soft-cap {softcap}"
    if float(device.compute_capability) < 8:
        return f"needs compute capability 8.0 or more, and this GPU has {device.compute_capability}"
    return ""


def triton_attention(
    query_RLNH: Float[Array, "R L N H"],
    key_RLKH: Float[Array, "R L K H"],
    value_RLKH: Float[Array, "R L K H"],
    *,
    segment_ids_RL: Int[Array, "R L"],
    positions_RL: Int[Array, "R L"],
    window: None = None,
    softcap: None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
    interpret: bool = False,
) -> Float[Array, "R L N H"]:
    """Computes `attention` with the same tokens as queries and keys, if positions rise along every segment.

    The kernel has no windows, no soft-caps, no grouped-query attention and, on a GPU, no float32 matmuls. Keys and
    values are therefore repeated for each query head; `why_not` rejects the rest. Arguments and result are those of
    `dense_attention`, except:

    Args:
      positions_RL: ignored.
      window: must be None.
      softcap: must be None.
      precision: ignored.
      interpret: runs the kernel without a GPU, for tests.
    """
    del positions_RL, precision
    assert window is None and softcap is None, "see `why_not`"
    length, num_heads, head_dim = query_RLNH.shape[1:]
    padding = -length % BLOCK

    def padded(x: Array) -> Array:
        # In float32, so that gradients of heads that share keys are summed in float32.
        repeated = jnp.repeat(x.astype(jnp.float32), num_heads // x.shape[2], axis=2).astype(x.dtype)
        return jnp.pad(repeated, ((0, 0), (0, padding), (0, 0), (0, 0)))

    mixed = _kernel().mha(
        padded(query_RLNH),
        padded(key_RLKH),
        padded(value_RLKH),
        jnp.pad(segment_ids_RL, ((0, 0), (0, padding))),
        sm_scale=head_dim**-0.5 if scale is None else scale,
        causal=True,
        block_sizes=_block_sizes(head_dim),
        interpret=interpret,
    )
    return mixed[:, :length]


def _block_sizes(head_dim: int) -> Any:
    """JAX's default blocks, halved for wide heads: one block of keys and one of values must fit in shared memory."""
    sizes = _kernel().BlockSizes.get_default()
    return sizes if head_dim <= 128 else dataclasses.replace(sizes, block_q=BLOCK // 2, block_k=BLOCK // 2)
