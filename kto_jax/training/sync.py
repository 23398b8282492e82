"""Periodic updates of the reference towards the policy, as in TR-DPO (arXiv 2404.09656)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kto_jax.config import ReferenceConfig
from kto_jax.models.model import Params
from kto_jax.training.rounding import round_reference


def sync_reference(reference: Params, policy: Params, step: Int[Array, ""], config: ReferenceConfig) -> Params:
    """The reference of the next step: mix · policy + (1 − mix) · reference if it is due, and unchanged if not.

    Args:
      reference: its parameters; {} if there is none.
      policy: the policy's; its value head, if any, is ignored.
      step: steps taken.
      config: how often and how far it moves.
    """
    if not config.sync_every or not reference:
        return reference

    def mix(reference: Params) -> Params:
        moved = jax.tree.map(_mean, reference, {name: policy[name] for name in reference})
        if config.sync_mix == 1:  # With a full copy, no small change can be lost.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, reference)
        return round_reference(moved, reference, step)

    def _mean(old: Array, new: Array) -> Array:
        wide = jnp.promote_types(new.dtype, jnp.float32)
        return config.sync_mix * new.astype(wide) + (1 - config.sync_mix) * old.astype(wide)

    return jax.lax.cond((step > 0) & (step % config.sync_every == 0), mix, lambda old: old, reference)
