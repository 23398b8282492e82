"""How a model's activations are sharded over devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array

from kto_jax.losses.logprobs import KEPT_LOGITS
from kto_jax.models.attention.blockwise import blockwise_attention
from kto_jax.models.attention.cached import cached_attention
from kto_jax.models.dispatch import run_experts_of_rows

Constrain = Callable[[Array, tuple[str, ...]], Array]
PackedAttention = Callable[..., Array]


def unconstrained(array: Array, axes: tuple[str, ...]) -> Array:
    """The array itself: on one device, nothing is sharded."""
    del axes
    return array


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sharding of a model's activations. The defaults are for one device; `make_layout` makes one for a mesh.

    Attributes:
      constrain: `constrain(array, logical_axes) -> array`, called on activations. Axes are "rows", "length", "embed",
        "heads", "kv_heads", "head_dim", "vocab" and "router"; "layers" and "slots" of a KV cache; "looked_up",
        "table_embed" and "half_embed" of embedded tokens.
      num_devices: devices that share every activation.
      row_parts: number of parts into which the tokens of a row are sharded.
      attention: attention over packed rows, with the signature of `dense_attention`.
      cached_attention: attention over a KV cache, with the signature of `cached_attention`.
      run_experts: the products of a mixture of experts, with the signature of `run_experts_of_rows`.
      reduce_dtype: dtype of the gradients of the layers' matrices and of the head where they are summed over devices;
        "bfloat16" applies to a model that computes in bfloat16 only.
      kept_logits: the most logits per device that are kept from the forward for the backward pass.
    """

    constrain: Constrain = unconstrained
    num_devices: int = 1
    row_parts: int = 1
    attention: PackedAttention = blockwise_attention
    cached_attention: Callable[..., Array] = cached_attention
    run_experts: Callable[..., Array] = run_experts_of_rows
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    kept_logits: int = KEPT_LOGITS


ONE_DEVICE = Layout()
