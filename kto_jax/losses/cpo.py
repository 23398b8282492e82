"""CPO: DPO with a uniform reference, plus likelihood of the chosen completion."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32


def cpo_loss(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    chosen_mean_logps: Float[Array, "*B"],
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> Float[Array, "*B"]:
    """CPO loss of each pair, `−log σ(β (log π_w − log π_l)) − α l̄_w`.

    >>> round(float(cpo_loss(jnp.array([-10.0]), jnp.array([-13.0]), jnp.array([-2.0]))[0]), 4)
    2.5544

    Args:
      chosen_logps: log π_policy of the chosen completion, summed over its tokens, in nats.
      rejected_logps: likewise, of the rejected completion.
      chosen_mean_logps: l̄_w, the chosen completion's mean over tokens.
      beta: scale of the log-probabilities.
      nll_weight: α, weight of the chosen completion's negative log-likelihood.

    Returns:
      One loss per pair; the reduction is the caller's.

    Source: Xu et al., arXiv 2401.08417.
    """
    gap = beta * (at_least_float32(chosen_logps) - at_least_float32(rejected_logps))
    return -jax.nn.log_sigmoid(gap) - nll_weight * at_least_float32(chosen_mean_logps)
