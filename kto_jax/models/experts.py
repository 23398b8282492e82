"""The feed-forward layer of a mixture of experts: a router chooses a few experts for every token.

The router computes in at least float32: in bfloat16, rounding would decide between experts of similar probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kto_jax.models.config import TransformerConfig
from kto_jax.models.layout import Layout
from kto_jax.models.lora import AdaptedMatrix
from kto_jax.models.quantised import QuantisedMatrix
from kto_jax.shapes import RouterSums

_EXPERTS = ("layers", "experts", "expert_embed", "mlp")


class _Matrix(nnx.Module):
    """A weight of all layers, stacked."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, scale: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)


class ExpertFeedForward(nnx.Module):
    """Several gated layers, of which each token passes through the K that its router gives the highest probability."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        activation: Callable[[Array], Array],
        dtype: Any,
        layout: Layout,
        rngs: nnx.Rngs,
    ):
        self.per_token, self.sum_to_one = config.experts_per_token, config.shares_sum_to_one
        self.activation, self.dtype = activation, dtype
        self.constrain, self.run_experts = layout.constrain, layout.run_experts
        layers, experts, embed, mlp = config.num_layers, config.num_experts, config.embed_dim, config.mlp_dim
        options: dict[str, Any] = {"scale": config.initializer_range, "rngs": rngs}
        self.router = _Matrix((layers, embed, experts), ("layers", "embed", "router"), **options)
        self.gate = _Matrix((layers, experts, embed, mlp), _EXPERTS, **options)
        self.up = _Matrix((layers, experts, embed, mlp), _EXPERTS, **options)
        self.down = _Matrix((layers, experts, mlp, embed), (*_EXPERTS[:2], "mlp", "expert_embed"), **options)

    def __call__(
        self, x_TD: Float[Array, "T D"], where_RL: Bool[Array, "R L"]
    ) -> tuple[Float[Array, "T D"], RouterSums]:
        """Passes every token through its experts; padding passes through none, and gives 0.

        Args:
          x_TD: the tokens, T = R L.
          where_RL: which of them are not padding.
        """
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits_TE = jnp.dot(
            x_TD.astype(wide), self.router.weight[...].astype(wide), precision=jax.lax.Precision.HIGHEST
        )
        logits_RLE = self.constrain(logits_TE.reshape(*where_RL.shape, -1), ("rows", "length", "router"))
        probabilities_RLE = jax.nn.softmax(logits_RLE, axis=-1)
        shares_RLK, chosen_RLK = jax.lax.top_k(probabilities_RLE, self.per_token)
        if self.sum_to_one:
            shares_RLK = shares_RLK / jnp.sum(shares_RLK, axis=-1, keepdims=True)
        chosen_RLK = jnp.where(where_RL[..., None], chosen_RLK, logits_RLE.shape[-1])
        x_RLD = self.constrain(x_TD.reshape(*where_RL.shape, -1), ("rows", "length", "embed"))
        matrices = {name: self._matrix(getattr(self, name).weight[...]) for name in ("gate", "up", "down")}
        out_RLD = self.run_experts(x_RLD, chosen_RLK, shares_RLK, matrices, self.activation)
        return out_RLD.reshape(x_TD.shape), _router_sums(logits_RLE, chosen_RLK, where_RL)

    def _matrix(self, weight: Array | QuantisedMatrix | AdaptedMatrix) -> Array | AdaptedMatrix:
        """The matrices of a layer's experts, dequantised."""
        if isinstance(weight, AdaptedMatrix):
            return dataclasses.replace(weight, frozen=self._matrix(weight.frozen))
        return weight.astype(self.dtype) if isinstance(weight, QuantisedMatrix) else weight


def _router_sums(logits_RLE: Array, chosen_RLK: Array, where_RL: Array) -> RouterSums:
    num_experts, axes = logits_RLE.shape[-1], (0, 1)
    normalizer_RL = jax.nn.logsumexp(logits_RLE, axis=-1)
    log_probabilities_RLE = logits_RLE - normalizer_RL[..., None]
    probabilities_RLE = jnp.exp(log_probabilities_RLE)
    entropy_RL = -jnp.sum(probabilities_RLE * log_probabilities_RLE, axis=-1)
    # Padding chose no expert, whose row is 0.
    counts_RLE = jnp.sum(jax.nn.one_hot(chosen_RLK, num_experts, dtype=logits_RLE.dtype), axis=2)
    return RouterSums(
        counts=jnp.sum(counts_RLE, axis=axes),
        probabilities=jnp.sum(jnp.where(where_RL[..., None], probabilities_RLE, 0), axis=axes),
        squared_normalizers=jnp.sum(jnp.where(where_RL, jnp.square(normalizer_RL), 0)),
        entropies=jnp.sum(jnp.where(where_RL, entropy_RL, 0)),
    )
