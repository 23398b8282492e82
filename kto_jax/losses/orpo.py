"""ORPO: likelihood of the chosen completion and an odds ratio against the rejected one, without a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32

# A probability of 1 has infinite odds: mean log-probabilities are clamped to this.
_MAX_MEAN_LOGP = -1e-6


def orpo_loss(
    chosen_mean_logps: Float[Array, "*#B"], rejected_mean_logps: Float[Array, "*B"], *, odds_weight: float = 0.1
) -> Float[Array, "*B"]:
    """ORPO loss of each pair, `−l̄_w − λ log σ(log odds_w − log odds_l)` with odds = p / (1 − p), p = exp(l̄).

    >>> round(float(orpo_loss(jnp.array([-1.0]), jnp.array([-1.0]))[0]), 4)  # 1 + 0.1 · log 2
    1.0693

    Args:
      chosen_mean_logps: l̄, mean log π_policy of the chosen completion's tokens, in nats. The odds clamp it below −1e-6.
      rejected_mean_logps: likewise, of the rejected completion.
      odds_weight: λ, usually 0.1 to 0.25.

    Returns:
      One loss per pair, the negative log-likelihood of the chosen completion included; the reduction is the caller's.

    Source: Hong et al., arXiv 2403.07691, equations (6) and (7).
    """
    chosen, rejected = at_least_float32(chosen_mean_logps), at_least_float32(rejected_mean_logps)
    return -chosen - odds_weight * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean_logps: jax.Array) -> jax.Array:
    mean_logps = jnp.minimum(mean_logps, _MAX_MEAN_LOGP)
    return mean_logps - jnp.log(-jnp.expm1(mean_logps))
