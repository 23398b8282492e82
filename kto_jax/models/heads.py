"""Scalar heads, which map a hidden state to one number: the reward of a completion, or the value of a prefix.

    reward  weight [D]                                    r = h · w                          (no bias)
    value   first.weight [D, D]   first.bias [D]          v = last(relu(second(relu(first(h)))))
            second.weight [D, D]  second.bias [D]
            last.weight [D]       last.bias []

The value head is that of Ethayarajh et al. 2024 (arXiv:2402.01306), appendix B: three layers, detached from the trunk.
It reads the hidden states of the policy, or of a tower: a trunk of its own, with embedding, layers and final norm,
which starts as the policy's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kto_jax.models.config import TransformerConfig

SCALAR_HEADS = ("none", "reward", "value")
SCALAR_HEAD = "scorer"
"""The head's key among the parameters; checkpoints store it."""
TOWER = "tower"
"""The key of a value head's own trunk among the head's parameters."""
_AXES: dict[str, dict[str, Any]] = {
    "reward": {"weight": ("embed",)},
    "value": {
        "first": {"weight": ("embed", "mlp"), "bias": ("mlp",)},
        "second": {"weight": ("mlp", "embed"), "bias": ("embed",)},
        "last": {"weight": ("embed",), "bias": ()},
    },
}


def init_scalar_head(kind: str, config: TransformerConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random parameters of a head, float32.

    Args:
      kind: "reward" or "value".
      config: the architecture whose hidden states it reads.
      key: PRNG key. A reward head is normal with the config's standard deviation. A value head starts at 0: only its
        first two layers are random, with the standard deviation that preserves the norm of their input.
    """
    width = config.embed_dim
    if kind == "reward":
        return {"weight": config.initializer_range * jax.random.normal(key, (width,))}
    scale = (2.0 / width) ** 0.5
    layers: dict[str, Any] = {
        name: {"weight": scale * jax.random.normal(layer_key, (width, width)), "bias": jnp.zeros(width)}
        for name, layer_key in zip(("first", "second"), jax.random.split(key), strict=True)
    }
    return layers | {"last": {"weight": jnp.zeros(width), "bias": jnp.zeros(())}}


def scalar_head_axes(kind: str) -> dict[str, Any]:
    """Logical axes of a head's parameters, nested as `init_scalar_head` nests them."""
    return _AXES[kind]


def apply_scalar_head(kind: str, params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """One number for each hidden state, in float32 or wider, whatever the dtype of hidden states and parameters."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    params = jax.tree.map(lambda leaf: leaf.astype(wide), params)
    x = hidden.astype(wide)
    if kind == "reward":
        return _product(x, params["weight"])
    for name in ("first", "second"):
        bias = jnp.expand_dims(params[name]["bias"], tuple(range(x.ndim - 1)))
        x = jax.nn.relu(_product(x, params[name]["weight"]) + bias)
    return _product(x, params["last"]["weight"]) + params["last"]["bias"]


def _product(x: Array, weight: Array) -> Array:
    return jnp.dot(x, weight, precision=jax.lax.Precision.HIGHEST)
