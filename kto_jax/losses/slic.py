"""SLiC-HF: a hinge that calibrates sequence likelihoods, plus likelihood of the chosen completion."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32


def slic_loss(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    chosen_mean_logps: Float[Array, "*B"],
    *,
    margin: float = 1.0,
    nll_weight: float = 0.1,
) -> Float[Array, "*B"]:
    """SLiC loss of each pair, `max(0, δ − log π_w + log π_l) − λ l̄_w`.

    The hinge alone is a human-aware loss: `halo_loss` with `values.slic` and the rejected log-probability as the
    reference point.

    >>> round(float(slic_loss(jnp.array([-10.0]), jnp.array([-10.5]), jnp.array([-2.0]))[0]), 4)
    0.7

    Args:
      chosen_logps: log π_policy of the chosen completion, summed over its tokens, in nats.
      rejected_logps: likewise, of the rejected completion.
      chosen_mean_logps: l̄_w, the chosen completion's mean over tokens.
      margin: δ, by how much the chosen log-probability should exceed the rejected one, in nats.
      nll_weight: λ, weight of the chosen completion's negative log-likelihood.

    Returns:
      One loss per pair; the reduction is the caller's.

    Source: Zhao et al., arXiv 2305.10425, equation (1).
    """
    gap = at_least_float32(chosen_logps) - at_least_float32(rejected_logps)
    return jax.nn.relu(margin - gap) - nll_weight * at_least_float32(chosen_mean_logps)
