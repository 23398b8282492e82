"""Value functions: the value of a gain (z > 0) or a loss (z < 0) relative to the reference point.

Any of them can be the `value_fn` of `kto_loss` and `halo_loss`. All are non-decreasing (PPO-Clip's if A > 0) and
compute in at least float32; gradients are finite for any finite z. `python -m kto_jax.curves` plots them.

Source: Ethayarajh et al., arXiv 2402.01306, section 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32, bounded_exponent

# Closer to 0 than this, the Kahneman-Tversky value is linear.
_KINK = 1e-6


def sigmoid(z: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """KTO's value, `σ(z)`: concave in gains, convex in losses, saturating in both."""
    return jax.nn.sigmoid(at_least_float32(z))


def log_sigmoid(z: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """DPO's value, `log σ(z)`: concave everywhere, so that a loss never saturates."""
    return jax.nn.log_sigmoid(at_least_float32(z))


def identity(z: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The risk-neutral value, `z`."""
    return at_least_float32(z)


def kahneman_tversky(z: Float[Array, "*B"], *, alpha: float = 0.88, loss_aversion: float = 2.25) -> Float[Array, "*B"]:
    """The value of Tversky and Kahneman, `z^α` for gains and `−λ (−z)^α` for losses, equation (4).

    Its slope is infinite at 0, where training starts. For |z| < 1e-6 it is therefore linear through 0 and ±1e-6, with
    slope `1e-6^(α−1)` (5.2 for α = 0.88), times λ for losses. At exactly z = 0 the slope is that of gains.

    >>> [round(float(value), 4) for value in kahneman_tversky(jnp.array([-2.0, 0.0, 2.0]))]
    [-4.1408, 0.0, 1.8404]

    Args:
      z: gain or loss.
      alpha: risk aversion in gains and risk seeking in losses, in (0, 1]; 1 is linear. 0.88 is the human median.
      loss_aversion: λ, weight of a loss relative to a gain; 2.25 is the human median.
    """
    z = at_least_float32(z)
    near = jnp.abs(z) < _KINK
    distance = jnp.where(near, _KINK, jnp.abs(z))  # keeps the power's slope finite where it is not used
    value = jnp.where(near, z * _KINK ** (alpha - 1), jnp.sign(z) * distance**alpha)
    return jnp.where(z < 0, loss_aversion, 1.0) * value


def slic(z: Float[Array, "*B"], *, margin: float = 1.0) -> Float[Array, "*B"]:
    """SLiC's value, `min(0, z − δ)`: constant beyond the margin δ."""
    return -jax.nn.relu(margin - at_least_float32(z))


def ppo_clip(
    z: Float[Array, "*B"], *, advantage: float | Float[Array, "*B"], clip_low: float, clip_high: float
) -> Float[Array, "*B"]:
    """PPO-Clip's value of a token, `A min(e^z, 1 + ε_high)` if A > 0, else `A max(e^z, 1 − ε_low)`.

    Args:
      z: log-ratio of the token, in nats; in the exponential, clamped to ±20.
      advantage: A.
      clip_low: ε_low.
      clip_high: ε_high.
    """
    ratio = jnp.exp(bounded_exponent(at_least_float32(z)))
    advantage = at_least_float32(advantage)
    return advantage * jnp.where(advantage > 0, jnp.minimum(ratio, 1 + clip_high), jnp.maximum(ratio, 1 - clip_low))
