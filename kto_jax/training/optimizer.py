"""The optimizer and its learning rate."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from kto_jax.config import OptimizerConfig
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.training.rounding import keep_in_bfloat16, reach_bfloat16


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
    # The first step already moves: warm-up counts from 1.
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
    """Clipping by global norm, of a value head apart from the rest, then AdamW or RMSProp.

    Args:
      config: which, and what its moments are kept in.
      learning_rate: by step.
      value_head: whether the policy has one.
      param_dtype: what the policy is kept in.
      seed: decides how bfloat16 moments and parameters are rounded; see rounding.py.
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
        update = keep_in_bfloat16(update, seed)
    optimizer = optax.chain(clip, update)
    return reach_bfloat16(optimizer, seed) if param_dtype == "bfloat16" else optimizer


def add_decayed_weights(weight_decay: float, decayed: Literal["matrices", "all"]) -> optax.GradientTransformation:
    """Adds weight_decay · parameter to the updates of the parameters that are decayed.

    optax's takes a mask too, but nests the state then, and checkpoints without a mask could not be read.

    Args:
      weight_decay: the factor.
      decayed: "matrices": the stacked matrices of the layers [layers, in, out], adapters among them; or "all".
    """

    def is_decayed(path: Any, parameter: Array) -> bool:
        return decayed == "all" or (getattr(path[0], "key", None) == "layers" and parameter.ndim == 3)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def add(path: Any, parameter: Array, update: Array) -> Array:
            return update + weight_decay * parameter if is_decayed(path, parameter) else update

        return jax.tree_util.tree_map_with_path(add, params, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def num_updates(opt_state: Any, default: Int[Array, ""]) -> Int[Array, ""]:
    """How many updates an optimizer has made: steps less those that were not finite.

    Args:
      opt_state: the optimizer's.
      default: for an optimizer that does not count.
    """
    counts = [count for _, count in optax.tree.get_all_with_path(opt_state, "count")]
    return counts[0] if counts else default


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients whose norm, over all arrays, is above `most` down to it.

    As optax's, but by a factor: XLA on CPU computes a product where it is read, and a quotient as an array of its own.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        factor = jnp.minimum(1, most / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
