"""SimPO: length-normalised rewards with a target margin, without a reference."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32


def simpo_loss(
    chosen_mean_logps: Float[Array, "*B"],
    rejected_mean_logps: Float[Array, "*B"],
    *,
    beta: float = 2.0,
    margin: float = 1.0,
) -> Float[Array, "*B"]:
    """SimPO loss of each pair, `−log σ(β (l̄_w − l̄_l) − γ)`.

    >>> round(float(simpo_loss(jnp.array([-1.0]), jnp.array([-1.5]))[0]), 4)  # −log σ(2 · 0.5 − 1)
    0.6931

    Args:
      chosen_mean_logps: l̄, mean log π_policy of the chosen completion's tokens, in nats.
      rejected_mean_logps: likewise, of the rejected completion.
      beta: scale of the rewards, usually 2 to 10.
      margin: γ, by how much the chosen reward should exceed the rejected one; usually 0.3 to 0.5 of beta.

    Returns:
      One loss per pair; the reduction is the caller's.

    Source: Meng et al., arXiv 2405.14734, equation (6).
    """
    rewards_gap = beta * (at_least_float32(chosen_mean_logps) - at_least_float32(rejected_mean_logps))
    return -jax.nn.log_sigmoid(rewards_gap - margin)
