"""Objectives whose loss is one of each token: offline and online PPO, and the GRPO family."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax import losses
from kto_jax.objectives.record import Advantages, Objective, Point, State, check_variant
from kto_jax.shapes import Completions


def ppo_offline(
    *,
    kl_weight: float = 0.1,
    clip_low: float = 0.75,
    clip_high: float = 3.0,
    value_weight: float = 0.5,
    discount: float = 1.0,
    trace: float = 0.95,
    rewards: str = "labels",
) -> Objective:
    """Offline PPO, arXiv 2402.01306, appendix B: the reference stands for the policy that sampled the completions.

    A completion's reward, ±1 by its label or its score, is on its last token. Each token adds the clipped surrogate,
    `kl_weight` times its log-ratio, and `value_weight` times the loss of the value head, whose gradient stops at the
    hidden states. Each batch is used once, so values are never clipped. The loss of a completion is the mean over its
    tokens.
    """

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        policy, reference, where_RSC = _token_logps_by_slot(c)
        assert c.tokens is not None
        value = jnp.broadcast_to(c.tokens.values[:, None, :], where_RSC.shape)
        by_label = jnp.where(c.desirable, 1.0, -1.0).astype(c.policy.dtype)
        reward_RS = c.scores if rewards == "scores" else by_label
        reward_RSC = jnp.where(_is_last(where_RSC), reward_RS[..., None], 0)
        old_value = jax.lax.stop_gradient(value)
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        advantage = losses.generalized_advantages(
            flat(reward_RSC), flat(old_value), discount=discount, trace=trace, where=flat(where_RSC)
        ).reshape(where_RSC.shape)
        per_token = (
            losses.ppo_clip_loss(policy, reference, advantage, clip_low=clip_low, clip_high=clip_high, where=where_RSC)
            + kl_weight * jnp.where(where_RSC, policy - reference, 0)
            + value_weight * losses.ppo_value_loss(value, old_value, advantage + old_value, where=where_RSC)
        )
        return jnp.sum(per_token, axis=-1) / jnp.maximum(c.lengths, 1)

    return Objective("thumbs", loss, scalar_head="value", needs_both_labels=rewards == "labels")


@dataclasses.dataclass(frozen=True)
class _Preset:
    """Settings of the token-level policy gradient; see `grpo` and `ppo`."""

    advantage: Literal["group", "leave_one_out", "gae"]
    scale: Literal["group", "batch", "none"]
    normalise: Literal["sequences", "tokens", "constant"]
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"


GRPO_VARIANTS = {
    "grpo": _Preset("group", "group", "sequences"),
    "dr_grpo": _Preset("group", "none", "constant"),
    "rloo": _Preset("leave_one_out", "none", "constant"),
    "dapo": _Preset("group", "group", "tokens", clip_high=0.28),
    "gspo": _Preset("group", "group", "sequences", 3e-4, 4e-4, ratio="sequence"),
    "cispo": _Preset("group", "group", "tokens", clip_high=4.0, surrogate="cispo"),
}
"""What the variants of grpo set."""
_PPO = _Preset("gae", "batch", "tokens")


@dataclasses.dataclass(frozen=True)
class _Terms:
    """Terms beside the surrogate, of the KL to the reference and of the entropy, and what clips the surrogate twice."""

    kl_weight: float
    kl_in: Literal["reward", "loss"]
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_target: float
    kl_horizon: float
    entropy_weight: float
    dual_clip: float


def grpo(
    *,
    variant: str = "dr_grpo",
    old_logps: str = "reference",
    advantage: str | None = None,
    scale: str | None = None,
    ratio: str | None = None,
    surrogate: str | None = None,
    normalise: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float = 0.0,
    kl_weight: float = 0.0,
    kl_in: str = "loss",
    kl_estimator: str = "k3",
    kl_target: float = 0.0,
    kl_horizon: float = 10_000.0,
    entropy_weight: float = 0.0,
    length_scale: float = 64.0,
) -> Objective:
    """The GRPO family; a variant only sets options, each of which may be set alone.

    `losses.policy_gradient_loss` has the loss of a token. With old_logps="reference" the advantages are the scores of
    the completions, and the reference stands for the policy that wrote them. With "sampled", both are figures of each
    token, which online training writes, and there may be a KL to the reference besides.
    """
    check_variant("grpo", variant, tuple(GRPO_VARIANTS))
    given: dict[str, Any] = {
        "advantage": advantage, "scale": scale, "ratio": ratio, "surrogate": surrogate, "normalise": normalise,
        "clip_low": clip_low, "clip_high": clip_high,
    }  # fmt: skip
    preset = dataclasses.replace(GRPO_VARIANTS[variant], **{name: x for name, x in given.items() if x is not None})
    terms = _Terms(kl_weight, kl_in, kl_estimator, kl_target, kl_horizon, entropy_weight, dual_clip)  # type: ignore[arg-type]
    _check_terms(terms, preset, length_scale, sampled=old_logps == "sampled")
    objective = _policy_gradient(preset, terms, length_scale, sampled=old_logps == "sampled")
    assert objective.advantages is not None
    drops = dataclasses.replace(objective.advantages, drop_equal=variant == "dapo")
    return dataclasses.replace(objective, advantages=drops)


def ppo(
    *,
    scale: str = "batch",
    normalise: str = "tokens",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    kl_weight: float = 0.05,
    kl_in: str = "reward",
    kl_estimator: str = "k1",
    kl_target: float = 0.0,
    kl_horizon: float = 10_000.0,
    entropy_weight: float = 0.0,
    length_scale: float = 64.0,
    value_weight: float = 0.5,
    value_clip: float = 0.2,
    value_detached: bool = True,
    value_tower: bool = False,
    value_warmup: int = 0,
    discount: float = 1.0,
    trace: float = 0.95,
) -> Objective:
    """PPO, arXiv 1707.06347, with a value head or a value model, on tokens that online training sampled.

    Online training estimates the advantages at the rollout, with rewards less the KL to the reference (arXiv
    2203.02155) and generalised advantage estimation. Each token adds the clipped surrogate and `value_weight` times the
    clipped loss of the value head.
    """
    chosen: dict[str, Any] = {"scale": scale, "normalise": normalise, "clip_low": clip_low, "clip_high": clip_high}
    preset = dataclasses.replace(_PPO, **chosen)
    terms = _Terms(kl_weight, kl_in, kl_estimator, kl_target, kl_horizon, entropy_weight, dual_clip)  # type: ignore[arg-type]
    _check_terms(terms, preset, length_scale, sampled=True)
    if value_tower and not value_detached:
        raise ValueError(
            "value_detached=False with value_tower=True: the value head reads no hidden states of the policy. Set one "
            "of the two."
        )
    objective = _policy_gradient(preset, terms, length_scale, sampled=True)
    assert objective.advantages is not None

    def value_loss(c: Completions) -> Float[Array, "R S"]:
        assert c.tokens is not None and c.tokens.sampled is not None
        where_RSC = _token_logps_by_slot(c)[2]
        values, old_values, returns = (
            jnp.broadcast_to(x[:, None, :], where_RSC.shape)
            for x in (c.tokens.values, c.tokens.sampled.values, c.tokens.sampled.returns)
        )
        return jnp.sum(losses.ppo_value_loss(values, old_values, returns, clip=value_clip, where=where_RSC), axis=-1)

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        policy_loss = objective.loss(c, point, state)
        if value_warmup:
            policy_loss = jnp.where(state["updates"] < value_warmup, 0.0, policy_loss)
        return policy_loss + value_weight * _normalised(value_loss(c), c, normalise, length_scale)

    def figures(c: Completions) -> dict[str, Float[Array, "R S"]]:
        assert objective.figures is not None
        return objective.figures(c) | {"value_loss": value_loss(c)}

    return dataclasses.replace(
        objective,
        loss=loss,
        figures=figures,
        scalar_head="value",
        value_detached=value_detached,
        value_tower=value_tower,
        advantages=dataclasses.replace(objective.advantages, discount=discount, trace=trace),
        initial_state={"updates": 0.0} if value_warmup else {},
        next_state=lambda state, rewards, where: {name: count + 1 for name, count in state.items()},
    )


def _check_terms(terms: _Terms, preset: _Preset, length_scale: float, *, sampled: bool) -> None:
    """Refuses options without an effect.

    Raises:
      ValueError: naming the option.
    """
    if length_scale != 64.0 and preset.normalise != "constant":
        raise ValueError(
            f'length_scale={length_scale} with normalise={preset.normalise!r}; only "constant" uses it. Remove it, or '
            "set normalise."
        )
    if terms.dual_clip and (terms.dual_clip <= 1 or preset.surrogate == "cispo"):
        raise ValueError(
            f"dual_clip={terms.dual_clip} with surrogate={preset.surrogate!r}. It is above 1, for the surrogate "
            '"clip"; 0 is none. Set dual_clip.'
        )
    if terms.kl_weight and not sampled:
        raise ValueError(
            f'kl_weight={terms.kl_weight} with old_logps="reference", whose reference stands for the policy that '
            "sampled. A KL needs a reference besides. Train online, which sets old_logps, or remove kl_weight."
        )
    if terms.kl_target and not (terms.kl_weight and terms.kl_in == "reward"):
        raise ValueError(
            f"kl_target={terms.kl_target} with kl_weight={terms.kl_weight} and kl_in={terms.kl_in!r}: only a positive "
            'weight of the KL in the rewards is adapted. Set kl_weight and kl_in="reward", or kl_target=0.'
        )
    if terms.kl_horizon != 10_000.0 and not terms.kl_target:
        raise ValueError(
            f"kl_horizon={terms.kl_horizon} without kl_target; only a weight that is adapted has a horizon. Set "
            "kl_target, or remove kl_horizon."
        )
    if preset.advantage == "gae" and preset.scale == "group":
        raise ValueError('scale="group" with a value head, which needs no groups. Set scale to "batch" or "none".')


def _policy_gradient(preset: _Preset, terms: _Terms, length_scale: float, *, sampled: bool) -> Objective:
    """The objective that the settings describe, without a value head."""
    clip: dict[str, Any] = {
        "ratio": preset.ratio, "surrogate": preset.surrogate, "clip_low": preset.clip_low,
        "clip_high": preset.clip_high, "dual_clip": terms.dual_clip,
    }  # fmt: skip

    def arguments(c: Completions) -> tuple[Array, Array, Array, Bool[Array, "R S C"]]:
        policy, old, where_RSC = _token_logps_by_slot(c)
        assert c.tokens is not None
        advantages = c.scores
        if c.tokens.sampled is not None:
            advantages = jnp.broadcast_to(c.tokens.sampled.advantages[:, None, :], where_RSC.shape)
        return policy, old, advantages, where_RSC

    def reference_of(c: Completions, where_RSC: Bool[Array, "R S C"]) -> Array:
        assert c.tokens is not None and c.tokens.sampled is not None
        return jnp.broadcast_to(c.tokens.sampled.reference_logps[:, None, :], where_RSC.shape)

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        policy, old, advantages, where_RSC = arguments(c)
        losses_RSC = losses.policy_gradient_loss(policy, old, advantages, where=where_RSC, **clip)
        if terms.kl_weight and terms.kl_in == "loss":
            estimate = losses.kl_estimate(
                policy, reference_of(c, where_RSC), estimator=terms.kl_estimator, where=where_RSC
            )
            losses_RSC = losses_RSC + terms.kl_weight * estimate
        if terms.entropy_weight:
            # ½ (log π)² has, on tokens that the policy sampled, the gradient of the negative entropy.
            losses_RSC = losses_RSC + terms.entropy_weight * jnp.square(jnp.where(where_RSC, policy, 0)) / 2
        return _normalised(jnp.sum(losses_RSC, axis=-1), c, preset.normalise, length_scale)

    def figures(c: Completions) -> dict[str, Float[Array, "R S"]]:
        policy, old, advantages, where_RSC = arguments(c)
        found = {
            "clipped": losses.clipped_tokens(policy, old, advantages, where=where_RSC, **clip),
            "old_kl": losses.k3_kl(old, policy, where=where_RSC),
        }
        if sampled:
            found["reference_kl"] = losses.k3_kl(policy, reference_of(c, where_RSC), where=where_RSC)
        return {name: jnp.sum(values, axis=-1, dtype=policy.dtype) for name, values in found.items()}

    in_reward = terms.kl_weight if terms.kl_in == "reward" else 0.0
    return Objective(
        "thumbs",
        loss,
        uses_reference=not sampled,
        needs_both_labels=False,
        reads_tokens=True,
        reads_sampled=sampled,
        figures=figures,
        mean_over="tokens" if preset.normalise == "tokens" else "examples",
        advantages=Advantages(
            preset.advantage, preset.scale, in_reward, terms.kl_estimator, terms.kl_target, terms.kl_horizon
        ),
    )


def _normalised(total_RS: Float[Array, "R S"], c: Completions, normalise: str, length_scale: float) -> Array:
    """The sums over the tokens of completions, as the mean over examples or tokens takes them."""
    if normalise == "sequences":
        return total_RS / jnp.maximum(c.lengths, 1)
    return total_RS / length_scale if normalise == "constant" else total_RS


def _token_logps_by_slot(c: Completions) -> tuple[Float[Array, "R S C"], Float[Array, "R S C"], Bool[Array, "R S C"]]:
    """Log-probabilities of policy and reference of each token, and which of them belong to each slot."""
    assert c.tokens is not None, "the step reads tokens for an objective that needs them"
    slots = jnp.arange(1, c.filled.shape[-1] + 1)
    where_RSC = c.tokens.segments[:, None, :] == slots[None, :, None]
    policy, reference = (
        jnp.broadcast_to(x[:, None, :], where_RSC.shape) for x in (c.tokens.policy, c.tokens.reference)
    )
    return policy, reference, where_RSC


def _is_last(where_RSC: Bool[Array, "R S C"]) -> Bool[Array, "R S C"]:
    """The last token of each slot."""
    return where_RSC & ~jnp.pad(where_RSC[..., 1:], ((0, 0), (0, 0), (0, 1)))
