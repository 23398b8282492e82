"""The losses of the routers of a mixture of experts in a step, and its load figures.

The load-balancing loss is a product of two means over the tokens, so the losses of microbatches do not add up to that
of the batch. The shares of tokens that chose each expert have no gradient, however: counted beforehand over the whole
batch, by one more forward pass, they make the loss linear in the rest, and its sum over microbatches exact.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.config import Config, ConfigError
from kto_jax.losses import balance_loss, z_loss
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model, Params
from kto_jax.shapes import PackedRows, RouterSums
from kto_jax.training.microbatches import map_microbatches


@dataclasses.dataclass(frozen=True)
class RouterWeights:
    """The weights of the routers' losses.

    Attributes:
      balance: of the load-balancing loss.
      z: of the z-loss.
    """

    balance: float = 0.0
    z: float = 0.0


NO_ROUTERS = RouterWeights()


def router_weights(config: Config, architecture: TransformerConfig) -> RouterWeights:
    """The weights of the routers' losses in a run.

    Raises:
      ConfigError: they are set for a model without experts.
    """
    balance, z = config.router.balance_weight, config.router.z_weight
    if not architecture.num_experts:
        if balance not in ("auto", 0) or z:
            raise ConfigError(
                f"config.router has balance_weight={balance} and z_weight={z}, and the model has no experts. Only a "
                'mixture of experts has routers. Set balance_weight to "auto" and z_weight to 0.'
            )
        return NO_ROUTERS
    if balance == "auto":
        balance = 0.0 if config.lora.rank else architecture.balance_weight
    return RouterWeights(float(balance), z)


def num_routed_tokens(model: Model, rows: PackedRows) -> Float[Array, ""]:
    """The number of tokens, padding not counted, times the number of layers; at least 1."""
    tokens = jnp.sum(rows.segment_ids > 0) * model.config.num_layers
    return jnp.maximum(tokens, 1).astype(jnp.promote_types(model.dtype, jnp.float32))


def count_choices(model: Model, policy: Params, rows: PackedRows, count: Array) -> Float[Array, " E"]:
    """How many tokens of the first `count` microbatches chose each expert, in all layers together."""

    def counts(one: PackedRows) -> Array:
        _, routed = model.route(policy, one.tokens, one.segment_ids, one.positions)
        assert routed is not None, "only a mixture of experts has choices"
        return jnp.sum(routed.counts, axis=0)

    return jax.lax.stop_gradient(jnp.sum(map_microbatches(counts, rows, count), axis=0))


def router_loss(
    weights: RouterWeights, routed: RouterSums, counts_E: Float[Array, " E"], num_tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """The share of a microbatch in the weighted losses of the routers.

    Args:
      weights: of the losses.
      routed: what the routers did with the microbatch.
      counts_E: how many tokens of the whole batch chose each expert.
      num_tokens: the batch's, from `num_routed_tokens`.
    """
    balance = balance_loss(counts_E, jnp.sum(routed.probabilities, axis=0), num_tokens)
    return weights.balance * balance + weights.z * z_loss(jnp.sum(routed.squared_normalizers), num_tokens)


def router_metrics(
    model: Model, weights: RouterWeights, routed: RouterSums, num_tokens: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """The losses of the routers and the load of the experts.

    Args:
      model: the policy.
      weights: of the losses.
      routed: what the routers did with each microbatch, [M, layers, E] or [M, layers].
      num_tokens: the batch's, from `num_routed_tokens`.

    Returns:
      router_loss: the weighted losses, which the loss includes. router_balance, router_z: each without its weight.
      router_entropy: mean entropy of the routers' probabilities, in nats. expert_max_load: the most tokens of an expert
      divided by the mean of its layer, the largest of all layers. dropped_tokens: choices that no expert computed; 0.
    """
    whole = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), routed)
    counts_E = jnp.sum(whole.counts, axis=0)
    balance = balance_loss(counts_E, jnp.sum(whole.probabilities, axis=0), num_tokens)
    z = z_loss(jnp.sum(whole.squared_normalizers), num_tokens)
    mean_load = num_tokens / model.config.num_layers * model.config.experts_per_token / model.config.num_experts
    return {
        "router_loss": weights.balance * balance + weights.z * z,
        "router_balance": balance,
        "router_z": z,
        "router_entropy": jnp.sum(whole.entropies) / num_tokens,
        "expert_max_load": jnp.max(whole.counts) / mean_load,
        "dropped_tokens": num_tokens * model.config.experts_per_token - jnp.sum(counts_E),
    }
