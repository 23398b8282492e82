"""Flash attention over packed rows on NVIDIA GPUs: tokamax's Mosaic GPU kernels for Hopper and Blackwell.

The kernels take, for each query, the first key that it may see: the start of its segment or of its window. No mask
array exists. The forward pass skips key blocks before that range; the backward pass computes every block below the
diagonal. tokamax is imported only when a run uses it, through modules that it does not document: the extra [cuda]
limits its version.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_HEAD_DIM = 256


def why_missing() -> str:
    """Why the kernels cannot be imported; empty if they can."""
    try:
        _module("pallas_mosaic_gpu")
    except ImportError as error:
        return f"tokamax is not installed, or has no such kernel ({error}); run `pip install 'kto_jax[cuda]'`"
    return ""


def why_not(query: Array, *, window: int | None, softcap: float | None, device: Any) -> str:
    """Why the kernels cannot compute this attention on this device; empty if they can."""
    del window, softcap
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16, and queries are {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"supports heads of at most {MAX_HEAD_DIM}, and these have {query.shape[-1]}"
    if not 9 <= float(device.compute_capability) < 11:
        return (
            f"runs on Hopper and Blackwell (9.x, 10.x), and this GPU has compute capability {device.compute_capability}"
        )
    return ""


@functools.cache
def _module(name: str) -> ModuleType:
    """One of tokamax's modules of attention.

    Raises:
      ImportError: tokamax is not installed, or this version has no such module.
    """
    module = importlib.import_module(f"tokamax._src.ops.attention.{name}")
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        # tokamax 0.0.12 would read this program's command line for its own flags, and refuse ours.
        flags.mark_as_parsed()
    return module


def mosaic_attention(
    query_RLNH: Float[Array, "R L N H"],
    key_RLKH: Float[Array, "R L K H"],
    value_RLKH: Float[Array, "R L K H"],
    *,
    segment_ids_RL: Int[Array, "R L"],
    positions_RL: Int[Array, "R L"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: jax.lax.Precision | None = None,
    interpret: bool = False,
) -> Float[Array, "R L N H"]:
    """Computes `attention` with the same tokens as queries and keys, if every segment has positions 0, 1, 2, ...

    In such a contiguous segment, a token's index minus its position is the index of the segment's first token; the
    packer writes no others. Scores, softmax and sums are float32. Arguments and result are those of `dense_attention`,
    except:

    Args:
      precision: ignored: the kernels multiply in the dtype of their inputs.
      interpret: computes the same masks with tokamax's plain XLA attention, which runs everywhere, for tests.
    """
    del precision
    base = _module("base")
    op = base.DotProductAttention() if interpret else _module("pallas_mosaic_gpu").PallasMosaicGpuFlashAttention()
    starts = first_keys(segment_ids_RL, positions_RL, window)
    return op(
        query_RLNH,
        key_RLKH,
        value_RLKH,
        mask=base.Mask(k_start=starts[:, None, :], is_causal=True),
        logits_scale=query_RLNH.shape[-1] ** -0.5 if scale is None else scale,
        logits_soft_cap=softcap,
    )


def first_keys(
    segment_ids_RL: Int[Array, "R L"], positions_RL: Int[Array, "R L"], window: int | None
) -> Int[Array, "R L"]:
    """Index of the first key in the row that each token sees; padding sees only itself."""
    indices = jnp.arange(segment_ids_RL.shape[1], dtype=jnp.int32)[None]
    reach = positions_RL if window is None else jnp.minimum(positions_RL, window - 1)
    return (indices - jnp.where(segment_ids_RL > 0, reach, 0)).astype(jnp.int32)
