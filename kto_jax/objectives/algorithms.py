"""One function per algorithm, and the table of them.

A function's keyword arguments are the fields of `config.objective` that it uses; their defaults are what "auto" stands
for. To add an objective, add a function and a line to the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax import losses, values
from kto_jax.losses import mean_logps
from kto_jax.objectives.record import Objective, Point, State, check_variant, implied_rewards, no_reference_point
from kto_jax.objectives.token_level import grpo, ppo, ppo_offline
from kto_jax.shapes import Completions

# ------------------------------------------------------------------------------------------------ thumbs


def kto(
    *,
    variant: str = "standard",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_nonzero_mean: bool = False,
    alpha: float = 0.88,
    loss_aversion: float = 2.25,
) -> Objective:
    """KTO, equation (7); `variant` changes its value function or its reference point.

    "zero": z0 is 0. "log_sigmoid", "identity", "kahneman_tversky": another value function; only the last uses `alpha`
    and `loss_aversion`. "reference_free": mean token log-probabilities replace log-ratios, and z0 is their mean over
    unrelated pairs, not clamped. "simple": z0 of each class is the mean log-ratio of the other class.
    """
    value_fns: dict[str, Callable[[Array], Array]] = {
        "log_sigmoid": values.log_sigmoid,
        "identity": values.identity,
        "kahneman_tversky": functools.partial(values.kahneman_tversky, alpha=alpha, loss_aversion=loss_aversion),
    }
    check_variant("kto", variant, ("standard", "zero", "reference_free", "simple", *value_fns))
    _check_kto_options(variant, alpha, loss_aversion, kl_nonzero_mean)
    loss_fn = functools.partial(
        losses.kto_loss,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        value_fn=value_fns.get(variant, values.sigmoid),
    )

    def loss(c: Completions, z0: Point, state: State) -> Float[Array, "R S"]:
        return loss_fn(*_log_ratio(c), c.desirable, z0)

    def _log_ratio(c: Completions) -> tuple[Array, Array]:
        if variant == "reference_free":
            return mean_logps(c.policy, c.lengths), jnp.zeros_like(c.policy)
        return c.policy, c.reference

    def reference_point(c: Completions) -> Float[Array, "..."]:
        if variant == "simple":
            return losses.opposite_class_reference_point(c.policy, c.reference, c.desirable, where=c.filled)
        where = c.filled & (c.policy != c.reference) if kl_nonzero_mean else c.filled
        return losses.kl_reference_point(*_log_ratio(c), where=where, clamp=variant != "reference_free")

    objective = Objective(
        reads="thumbs",
        loss=loss,
        rewards=lambda c: beta * (_log_ratio(c)[0] - _log_ratio(c)[1]),
        uses_reference=variant != "reference_free",
        first_pass="matched" if variant == "simple" else "unmatched",
        reference_point=reference_point,
        reference_reward=lambda z0, state: beta * z0,
        saturates=variant not in value_fns,
    )
    if variant == "zero":
        return dataclasses.replace(objective, first_pass="none", reference_point=no_reference_point)
    return objective


def _check_kto_options(variant: str, alpha: float, loss_aversion: float, kl_nonzero_mean: bool) -> None:
    if variant != "kahneman_tversky" and (alpha, loss_aversion) != (0.88, 2.25):
        raise ValueError(
            f"alpha={alpha} and loss_aversion={loss_aversion} with variant={variant!r}; only the variant "
            "kahneman_tversky uses them. Remove them, or set variant."
        )
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} of the Kahneman-Tversky value must be in (0, 1]. Set alpha.")
    if variant in ("zero", "reference_free", "simple") and kl_nonzero_mean:
        raise ValueError(
            f"kl_nonzero_mean=True with variant={variant!r}, which has no KL to average. It is for the other variants. "
            "Remove it."
        )


def apo_zero_unpaired(*, beta: float = 0.1) -> Objective:
    """KTO with z0 = 0 and weights of 1, arXiv 2408.06266."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        return losses.apo_zero_unpaired_loss(c.policy, c.reference, c.desirable, beta=beta)

    return Objective("thumbs", loss, functools.partial(implied_rewards, beta=beta), saturates=True)


def bco(*, beta: float = 0.1) -> Objective:
    """BCO, with rewards centred by their mean over all earlier steps, arXiv 2404.04656."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        return losses.bco_loss(c.policy, c.reference, c.desirable, state["running_mean"], beta=beta)

    return Objective(
        "thumbs",
        loss,
        functools.partial(implied_rewards, beta=beta),
        reference_reward=lambda point, state: state["running_mean"],
        **_RUNNING_MEAN,
    )


def _next_running_mean(state: State, rewards: Array, where: Array) -> State:
    mean, count = losses.update_running_mean(state["running_mean"], state["running_count"], rewards, where=where)
    return {"running_mean": mean, "running_count": count}


_RUNNING_MEAN: dict[str, Any] = {
    "initial_state": {"running_mean": 0.0, "running_count": 0.0},
    "next_state": _next_running_mean,
}


def csft(*, good_control: str = "<|good|>", bad_control: str = "<|bad|>") -> Objective:
    """Conditional SFT: every completion follows a control text for its label; sample after the good one.

    In evaluation all held-out completions follow the good control, and the loss is that of the desirable ones.
    """
    return Objective(
        "thumbs",
        _sft_of_slot,
        _mean_logps,
        uses_reference=False,
        controls=(bad_control, good_control),
        evaluated_as=sft(),
    )


# ------------------------------------------------------------------------------------------------ demonstrations


def sft() -> Objective:
    """Supervised fine-tuning on the desirable completions; the loss is a mean over the tokens of each."""
    return Objective("desirable", _sft_of_slot, _mean_logps, uses_reference=False)


def _sft_of_slot(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
    return losses.sft_loss(c.policy, c.lengths)


def _mean_logps(c: Completions) -> Float[Array, "*M R S"]:
    return mean_logps(c.policy, c.lengths)


# ------------------------------------------------------------------------------------------------ pairs


def _chosen_and_rejected(x_RS: Float[Array, "R S"]) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    return x_RS[..., 0::2], x_RS[..., 1::2]


def _in_chosen_slots(losses_RP: Float[Array, "R P"]) -> Float[Array, "R S"]:
    return jnp.stack([losses_RP, jnp.zeros_like(losses_RP)], axis=-1).reshape(*losses_RP.shape[:-1], -1)


def _four_logps(c: Completions) -> tuple[Array, Array, Array, Array]:
    return *_chosen_and_rejected(c.policy), *_chosen_and_rejected(c.reference)


def kto_log_utility(
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    as_printed: bool = False,
) -> Objective:
    """KTO's utility of a pair inside a log-sigmoid; see `losses.log_utility_loss`, also for `as_printed`."""

    def loss(c: Completions, z0: Point, state: State) -> Float[Array, "R S"]:
        return _in_chosen_slots(
            losses.log_utility_loss(
                *_four_logps(c),
                z0,
                beta=beta,
                desirable_weight=desirable_weight,
                undesirable_weight=undesirable_weight,
                as_printed=as_printed,
            )
        )

    return Objective(
        "pairs",
        loss,
        functools.partial(implied_rewards, beta=beta),
        first_pass="unmatched",
        reference_point=lambda c: losses.kl_reference_point(c.policy, c.reference, where=c.filled),
    )


def dpo(
    *,
    variant: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Objective:
    """DPO and its variants, see `losses.dpo_loss`; only the alpha divergence uses `alpha`."""
    loss_fn = functools.partial(
        losses.dpo_loss,
        variant=variant,
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        alpha=alpha,
    )
    losses.check_dpo_options(variant, label_smoothing, f_divergence)
    if alpha != 0.5 and f_divergence != "alpha":
        raise ValueError(
            f"alpha={alpha} with f_divergence={f_divergence!r}; only the divergence alpha uses it. Remove it, or set "
            "f_divergence."
        )
    to_reward = losses.F_DIVERGENCES[f_divergence]

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        chosen_lengths, rejected_lengths = _chosen_and_rejected(c.lengths)
        return _in_chosen_slots(
            loss_fn(
                *_four_logps(c),
                chosen_lengths=jnp.maximum(chosen_lengths, 1),
                rejected_lengths=jnp.maximum(rejected_lengths, 1),
                running_mean=state.get("running_mean", 0.0),
            )
        )

    state = _RUNNING_MEAN if variant == "bco_pair" else {}
    return Objective("pairs", loss, lambda c: beta * to_reward(c.policy - c.reference, alpha), **state)


def orpo(*, odds_weight: float = 0.1) -> Objective:
    """ORPO, arXiv 2403.07691."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        return _in_chosen_slots(losses.orpo_loss(*_chosen_and_rejected(_mean_logps(c)), odds_weight=odds_weight))

    return Objective("pairs", loss, lambda c: odds_weight * _mean_logps(c), uses_reference=False)


def simpo(*, beta: float = 2.0, margin: float = 1.0) -> Objective:
    """SimPO, arXiv 2405.14734."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        return _in_chosen_slots(losses.simpo_loss(*_chosen_and_rejected(_mean_logps(c)), beta=beta, margin=margin))

    return Objective("pairs", loss, lambda c: beta * _mean_logps(c), uses_reference=False)


def cpo(*, beta: float = 0.1, nll_weight: float = 1.0) -> Objective:
    """CPO, arXiv 2401.08417."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        chosen_mean, _ = _chosen_and_rejected(_mean_logps(c))
        return _in_chosen_slots(
            losses.cpo_loss(*_chosen_and_rejected(c.policy), chosen_mean, beta=beta, nll_weight=nll_weight)
        )

    return Objective("pairs", loss, lambda c: beta * c.policy, uses_reference=False)


def slic(*, margin: float = 1.0, nll_weight: float = 0.1) -> Objective:
    """SLiC-HF, arXiv 2305.10425."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        chosen_mean, _ = _chosen_and_rejected(_mean_logps(c))
        return _in_chosen_slots(
            losses.slic_loss(*_chosen_and_rejected(c.policy), chosen_mean, margin=margin, nll_weight=nll_weight)
        )

    return Objective("pairs", loss, lambda c: c.policy, uses_reference=False)


def reward(*, margin: float = 0.0, centring: float = 0.0) -> Objective:
    """A Bradley-Terry reward model: a linear head on the last token's hidden state in place of the output head."""

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        return _in_chosen_slots(
            losses.bradley_terry_loss(*_chosen_and_rejected(c.policy), margin=margin, centring=centring)
        )

    return Objective("pairs", loss, lambda c: c.policy, uses_reference=False, scalar_head="reward")


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "kto": kto,
    "kto_log_utility": kto_log_utility,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
    "dpo": dpo,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
    "slic": slic,
    "sft": sft,
    "csft": csft,
    "reward": reward,
    "ppo_offline": ppo_offline,
    "grpo": grpo,
    "ppo": ppo,
}
