"""Objectives whose loss is one of each token: offline PPO, and the GRPO family."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kto_jax import losses
from kto_jax.objectives.record import Objective, Point, State, check_variant
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
class _GrpoVariant:
    """Settings of the token-level policy gradient; see `grpo`."""

    advantages: Literal["group", "scaled_group", "leave_one_out"]
    mean: Literal["sequences", "tokens", "constant"]
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"


GRPO_VARIANTS = {
    "grpo": _GrpoVariant("scaled_group", "sequences"),
    "dr_grpo": _GrpoVariant("group", "constant"),
    "rloo": _GrpoVariant("leave_one_out", "constant"),
    "dapo": _GrpoVariant("scaled_group", "tokens", clip_high=0.28),
    "gspo": _GrpoVariant("scaled_group", "sequences", 3e-4, 4e-4, ratio="sequence"),
    "cispo": _GrpoVariant("scaled_group", "tokens", clip_high=4.0, surrogate="cispo"),
}
"""What the variants of grpo set."""


def grpo(
    *,
    variant: str = "dr_grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    length_scale: float = 64.0,
) -> Objective:
    """The GRPO family on completions with advantages as scores; the reference stands for the policy that wrote them.

    `losses.policy_gradient_loss` has the loss of a token. "grpo" and "gspo" average over the tokens of a completion;
    "dapo" and "cispo" over all tokens of the batch; "dr_grpo" and "rloo" divide each completion's sum by
    `length_scale`. There is no KL term. Online training makes the scores from rewards, as the variant says.
    """
    check_variant("grpo", variant, tuple(GRPO_VARIANTS))
    setting = GRPO_VARIANTS[variant]
    if length_scale != 64.0 and setting.mean != "constant":
        raise ValueError(
            f"length_scale={length_scale} with variant={variant!r}; only the variants dr_grpo and rloo use it. Remove "
            "it, or set variant."
        )
    token_loss = functools.partial(
        losses.policy_gradient_loss,
        ratio=setting.ratio,
        surrogate=setting.surrogate,
        clip_low=setting.clip_low if clip_low is None else clip_low,
        clip_high=setting.clip_high if clip_high is None else clip_high,
    )

    def loss(c: Completions, point: Point, state: State) -> Float[Array, "R S"]:
        policy, old, where_RSC = _token_logps_by_slot(c)
        total_RS = jnp.sum(token_loss(policy, old, c.scores, where=where_RSC), axis=-1)
        if setting.mean == "sequences":
            return total_RS / jnp.maximum(c.lengths, 1)
        return total_RS / length_scale if setting.mean == "constant" else total_RS

    return Objective(
        "thumbs",
        loss,
        needs_both_labels=False,
        reads_tokens=True,
        mean_over="tokens" if setting.mean == "tokens" else "examples",
        advantages=setting.advantages,
    )


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
