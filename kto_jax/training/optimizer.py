"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from kto_jax.config import OptimizerConfig
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.training.rounding import with_bfloat16_moments, with_bfloat16_params


def make_learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then the configured schedule until `num_steps`."""
    peak, last = config.learning_rate, config.final_learning_rate
    remaining = max(num_steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, last, remaining),
        "cosine": optax.cosine_decay_schedule(peak, remaining, alpha=last / peak),
    }[config.schedule]
    if config.warmup_steps == 0:
        return after
    # Warm-up counts from 1, so the first step already moves.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    *,
    value_head: bool = False,
    param_dtype: str = "float32",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Clips by global norm, with a separate norm for a value head, then applies AdamW or RMSProp.

    Args:
      config: the optimizer's settings, with the dtype of its moments.
      learning_rate: by step.
      value_head: whether the policy has one.
      param_dtype: dtype of the policy's parameters.
      seed: of the stochastic rounding of bfloat16 moments and parameters; see rounding.py.
    """
    clip = clip_by_global_norm(config.clip_norm)
    if value_head:
        groups = {"policy": clip, SCALAR_HEAD: clip_by_global_norm(config.value_clip_norm)}
        clip = optax.partition(groups, lambda params: {n: n if n == SCALAR_HEAD else "policy" for n in params})
    if config.name == "adamw":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype="float32")
    else:
        scale = optax.scale_by_rms(decay=0.99, eps=config.eps, eps_in_sqrt=False)
    update = optax.chain(
        scale,
        add_decayed_weights(config.weight_decay, config.decayed),
        optax.scale_by_learning_rate(learning_rate),
    )
    if config.moments_dtype == "bfloat16":
        update = with_bfloat16_moments(update, seed)
    optimizer = optax.chain(clip, update)
    return with_bfloat16_params(optimizer, seed) if param_dtype == "bfloat16" else optimizer


def add_decayed_weights(weight_decay: float, decayed: Literal["matrices", "all"]) -> optax.GradientTransformation:
    """Adds weight_decay · parameter to the updates of decayed parameters.

    optax's version with a mask nests the state, which would make checkpoints without a mask unreadable.

    Args:
      weight_decay: the factor.
      decayed: "matrices": the layers' stacked matrices, [layers, in, out] and those of experts, including adapters; or
        "all".
    """

    def is_decayed(path: Any, parameter: Array) -> bool:
        in_layers = any(getattr(part, "key", None) == "layers" for part in path)
        return decayed == "all" or (in_layers and parameter.ndim >= 3)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def add(path: Any, parameter: Array, update: Array) -> Array:
            return update + weight_decay * parameter if is_decayed(path, parameter) else update

        return jax.tree_util.tree_map_with_path(add, params, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def num_updates(opt_state: Any, default: Int[Array, ""]) -> Int[Array, ""]:
    """Number of updates that an optimizer has made: steps minus non-finite ones.

    Args:
      opt_state: the optimizer's state.
      default: returned for an optimizer without a count.
    """
    counts = [count for _, count in optax.tree.get_all_with_path(opt_state, "count")]
    return counts[0] if counts else default


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `most`.

    As optax's, but with a product: XLA on CPU fuses a product into its consumers, and materialises a quotient.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        factor = jnp.minimum(1, most / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
