"""DPO and its variants: losses of a chosen and a rejected completion of the same prompt, against a reference.

With u = log π_policy − log π_reference of a completion and Δ = u_chosen − u_rejected, DPO is `−log σ(βΔ)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32, bounded_exponent

log_sigmoid = jax.nn.log_sigmoid
sigmoid = jax.nn.sigmoid

# EXO's target needs a share for the rejected completion; its authors take this.
_EXO_SMOOTHING = 1e-3


@dataclasses.dataclass(frozen=True)
class _Options:
    beta: float
    smoothing: float
    running_mean: jax.Array
    chosen_lengths: jax.Array | float
    rejected_lengths: jax.Array | float


def dpo_loss(
    policy_chosen_logps: Float[Array, "*B"],
    policy_rejected_logps: Float[Array, "*B"],
    reference_chosen_logps: Float[Array, "*B"],
    reference_rejected_logps: Float[Array, "*B"],
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    chosen_lengths: Float[Array, "*B"] | None = None,
    rejected_lengths: Float[Array, "*B"] | None = None,
    running_mean: float | Float[Array, ""] = 0.0,
) -> Float[Array, "*B"]:
    """DPO loss of each pair, `−(1−ε) log σ(βΔ) − ε log σ(−βΔ)`, or one of its variants.

    >>> losses = dpo_loss(jnp.array([-20.0]), jnp.array([-24.0]), jnp.array([-21.0]), jnp.array([-22.0]))
    >>> round(float(losses[0]), 4)  # −log σ(0.1 · (1 − (−2)))
    0.5544

    Args:
      policy_chosen_logps: log π_policy of the chosen completion, summed over its tokens, in nats.
      policy_rejected_logps: likewise, of the rejected completion.
      reference_chosen_logps: log π_reference of the chosen completion, likewise.
      reference_rejected_logps: log π_reference of the rejected completion, likewise.
      beta: strength of the regularisation towards the reference.
      variant: a key of `DPO_VARIANTS`.
      label_smoothing: ε, the share of labels taken to be wrong; for sigmoid, robust (below ½) and exo_pair.
      f_divergence: a key of `F_DIVERGENCES`; in every variant it maps the log-ratio u to the implied reward.
      alpha: α of the alpha divergence; 1 is the reverse KL.
      chosen_lengths: tokens of the chosen completion, which ipo divides by; None if the inputs are already means.
      rejected_lengths: likewise, of the rejected completion.
      running_mean: δ of bco_pair, a running mean of rewards βu (see `update_running_mean`); without gradient.

    Returns:
      One loss per pair; the reduction is the caller's.

    Raises:
      ValueError: an unknown variant or divergence, or a label smoothing that the variant cannot use.

    Source: Rafailov et al., arXiv 2305.18290, equation (7); divergences: Wang et al., arXiv 2309.16240.
    """
    check_dpo_options(variant, label_smoothing, f_divergence)
    to_reward = F_DIVERGENCES[f_divergence]
    chosen = to_reward(at_least_float32(policy_chosen_logps) - at_least_float32(reference_chosen_logps), alpha)
    rejected = to_reward(at_least_float32(policy_rejected_logps) - at_least_float32(reference_rejected_logps), alpha)
    options = _Options(
        beta=beta,
        smoothing=label_smoothing,
        running_mean=jax.lax.stop_gradient(at_least_float32(running_mean)),
        chosen_lengths=1.0 if chosen_lengths is None else at_least_float32(chosen_lengths),
        rejected_lengths=1.0 if rejected_lengths is None else at_least_float32(rejected_lengths),
    )
    return DPO_VARIANTS[variant](chosen, rejected, options)


def check_dpo_options(variant: str, smoothing: float, f_divergence: str) -> None:
    """Refuses options of `dpo_loss` that conflict.

    Raises:
      ValueError: an unknown variant or divergence, or a label smoothing that the variant cannot use.
    """
    if variant not in DPO_VARIANTS:
        raise ValueError(f"variant={variant!r} is not a DPO variant. Choose one of {', '.join(DPO_VARIANTS)}.")
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"f_divergence={f_divergence!r} is not known. Choose one of {', '.join(F_DIVERGENCES)}.")
    if smoothing and variant not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing={smoothing} has no meaning for variant={variant!r}; only {', '.join(_SMOOTHED)} use it. "
            "Set label_smoothing to 0 or choose one of these."
        )
    limit = 0.5 if variant == "robust" else 1.0
    if not 0 <= smoothing < limit:
        raise ValueError(
            f"label_smoothing={smoothing} with variant={variant!r} must be in [0, {limit}). It is the share of labels "
            "that are wrong: lower it."
        )


def _sigmoid(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`−(1−ε) log σ(βΔ) − ε log σ(−βΔ)`; with ε > 0 this is cDPO."""
    z = o.beta * (chosen - rejected)
    return -(1 - o.smoothing) * log_sigmoid(z) - o.smoothing * log_sigmoid(-z)


def _robust(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)`: unbiased under labels flipped at rate ε. arXiv 2403.00409."""
    z = o.beta * (chosen - rejected)
    return (-(1 - o.smoothing) * log_sigmoid(z) + o.smoothing * log_sigmoid(-z)) / (1 - 2 * o.smoothing)


def _hinge(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`max(0, 1 − βΔ)`. arXiv 2309.06657."""
    return jax.nn.relu(1 - o.beta * (chosen - rejected))


def _ipo(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`(u_w / length_w − u_l / length_l − 1/(2β))²`. arXiv 2310.12036."""
    return jnp.square(chosen / o.chosen_lengths - rejected / o.rejected_lengths - 1 / (2 * o.beta))


def _exo_pair(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """KL of the policy's preference from the smoothed label; an ε of 0 is taken as 1e-3. arXiv 2402.00856.

    `σ(βΔ) (log σ(βΔ) − log(1−ε)) + σ(−βΔ) (log σ(−βΔ) − log ε)`
    """
    z = o.beta * (chosen - rejected)
    smoothing = o.smoothing or _EXO_SMOOTHING
    return sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-smoothing)) + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(smoothing))


def _nca_pair(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`−log σ(βu_w) − ½ log σ(−βu_w) − ½ log σ(−βu_l)`. arXiv 2402.05369."""
    w, l = o.beta * chosen, o.beta * rejected  # noqa: E741
    return -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-l)


def _bco_pair(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`−log σ(βu_w − δ) − log σ(−(βu_l − δ))`. arXiv 2404.04656."""
    delta = o.running_mean
    return -log_sigmoid(o.beta * chosen - delta) - log_sigmoid(-(o.beta * rejected - delta))


def _sppo_hard(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`(u_w − 1/(2β))² + (u_l + 1/(2β))²`. arXiv 2405.00675."""
    return jnp.square(chosen - 1 / (2 * o.beta)) + jnp.square(rejected + 1 / (2 * o.beta))


def _apo_zero(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`1 − σ(βu_w) + σ(βu_l)`: chosen up, rejected down, for when the chosen beats the policy. arXiv 2408.06266."""
    return sigmoid(-o.beta * chosen) + sigmoid(o.beta * rejected)


def _apo_down(chosen: jax.Array, rejected: jax.Array, o: _Options) -> jax.Array:
    """`σ(βu_w) + 1 − σ(βΔ)`: both down, rejected more, for when the policy beats the chosen. arXiv 2408.06266."""
    return sigmoid(o.beta * chosen) + sigmoid(-o.beta * (chosen - rejected))


DPO_VARIANTS: dict[str, Callable[[jax.Array, jax.Array, _Options], jax.Array]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""Name -> (chosen rewards, rejected rewards, options) -> losses."""

_SMOOTHED = ("sigmoid", "robust", "exo_pair")


def _reverse_kl(u: jax.Array, alpha: float) -> jax.Array:
    """`u`."""
    return u


def _forward_kl(u: jax.Array, alpha: float) -> jax.Array:
    """`1 − e^{−u}`."""
    return -jnp.expm1(bounded_exponent(-u))


def _js(u: jax.Array, alpha: float) -> jax.Array:
    """Jensen-Shannon: `log 2 + log σ(u)`."""
    return jnp.log(2.0) + log_sigmoid(u)


def _alpha(u: jax.Array, alpha: float) -> jax.Array:
    """`(e^{(α−1)u} − 1) / (α−1)`, and its limit u for α = 1."""
    if alpha == 1:
        return u
    return jnp.expm1(bounded_exponent((alpha - 1) * u)) / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}
"""Name -> (log-ratio u, α) -> implied reward: f′(π_policy/π_reference), shifted to 0 at u = 0."""
