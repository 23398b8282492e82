"""The record of an objective: its data, reference point and loss, over packed slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.shapes import Completions

State = Mapping[str, Array]
Point = Float[Array, ""] | Float[Array, "R S"]


def implied_rewards(completions: Completions, beta: float = 1.0) -> Float[Array, "*M R S"]:
    """β (log π_policy − log π_reference) of each completion."""
    return beta * (completions.policy - completions.reference)


def no_reference_point(completions: Completions) -> Float[Array, ""]:
    """0, in the dtype of the log-probabilities."""
    return jnp.zeros((), completions.policy.dtype)


def _keep_state(state: State, rewards: Array, where: Array) -> State:
    return state


@dataclasses.dataclass(frozen=True)
class Advantages:
    """How online training turns the rewards of a round into advantages.

    Attributes:
      kind: "group": a completion's reward less the mean of its prompt's completions; "leave_one_out": less the mean of
        the others; "gae": generalised advantage estimation over its tokens, with the value head.
      scale: the standard deviation that advantages are divided by: of the prompt's rewards ("group"), or of the whole
        round ("batch": of its rewards, or for "gae" of its tokens' advantages, which are centred too), or "none".
      kl_weight: weight of the KL to the reference that is subtracted from the rewards.
      kl_estimator: how it is estimated.
      kl_target: nats per completion that the weight is adapted to after each round; 0 keeps the weight.
      kl_horizon: completions over which the weight may change by a fifth.
      discount: γ of "gae".
      trace: λ of "gae".
      drop_equal: leave out prompts all of whose completions have the same reward, as DAPO does.
    """

    kind: Literal["group", "leave_one_out", "gae"]
    scale: Literal["group", "batch", "none"] = "none"
    kl_weight: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float = 0.0
    kl_horizon: float = 10_000.0
    discount: float = 1.0
    trace: float = 0.95
    drop_equal: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective that the step minimises.

    Attributes:
      reads: what an example is. "thumbs": a completion; "desirable": a desirable completion; "pairs": a chosen and a
        rejected completion of one prompt, in slots 2k and 2k + 1.
      loss: (completions of a microbatch, reference point, state) -> one loss per slot [R, S]; a pair's loss is in the
        slot of the chosen completion.
      rewards: completions -> their implied rewards, for the metrics.
      uses_reference: whether the loss uses log-ratios; if not, there is no reference.
      first_pass: rows of the global batch that are evaluated before any loss, without gradient: "none", "unmatched"
        (each prompt with an unrelated completion) or "matched".
      reference_point: completions of the first pass [M, R, S] -> a scalar, or one number per slot.
      reference_reward: (reference point, state) -> the reward from which gains and losses of thumbs are measured.
      saturates: whether the value function is a sigmoid.
      initial_state: initial values of the objective's state, by name.
      next_state: (state, rewards of the batch [M, R, S], mask) -> the state of the next step.
      reads_tokens: whether the loss reads per-token log-probabilities (`Completions.tokens`) without a value head.
      mean_over: what the step divides the sum of the losses by: the "examples" or the "tokens" of the global batch.
      reads_sampled: whether the loss reads the figures of sampled tokens (`TokenScores.sampled`). The reference's
        log-probabilities are then those of the policy that sampled them, and no reference model is needed.
      figures: completions with tokens -> sums over the tokens of each completion, by name, for the metrics; None for
        none.
      advantages: how online training turns rewards into advantages; None if the objective takes labels or pairs.
      value_detached: whether the gradient of a value head stops at the hidden states that it reads.
      value_tower: whether a value head reads a trunk of its own, which is trained with it.
      scalar_head: "none", a "reward" head in place of the output head, or a "value" head besides it.
      needs_both_labels: whether thumbs of only one label are refused.
      controls: texts before undesirable and before desirable completions.
      evaluated_as: the objective that evaluates held-out rows; None for this one.
      humanline: range that each token's log-ratio is clamped to, in nats; None for no clamp.
      options: the resolved options, for reports.
    """

    reads: Literal["thumbs", "desirable", "pairs"]
    loss: Callable[[Completions, Point, State], Float[Array, "R S"]]
    rewards: Callable[[Completions], Float[Array, "*M R S"]] = implied_rewards
    uses_reference: bool = True
    first_pass: Literal["none", "unmatched", "matched"] = "none"
    reference_point: Callable[[Completions], Float[Array, "..."]] = no_reference_point
    reference_reward: Callable[[Array, State], Array] = lambda point, state: jnp.zeros_like(point)
    saturates: bool = False
    initial_state: Mapping[str, float] = dataclasses.field(default_factory=dict)
    next_state: Callable[[State, Array, Array], State] = _keep_state
    reads_tokens: bool = False
    mean_over: Literal["examples", "tokens"] = "examples"
    reads_sampled: bool = False
    figures: Callable[[Completions], dict[str, Float[Array, "R S"]]] | None = None
    advantages: Advantages | None = None
    value_detached: bool = True
    value_tower: bool = False
    scalar_head: Literal["none", "reward", "value"] = "none"
    needs_both_labels: bool = True
    controls: tuple[str, str] | None = None
    evaluated_as: Objective | None = None
    humanline: tuple[float, float] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def examples(self) -> str:
        """The name of the examples."""
        return {"thumbs": "thumbs", "desirable": "demonstrations", "pairs": "pairs"}[self.reads]

    def counts(self, filled: Any, desirable: Any) -> Any:
        """Which slots count as examples: all, or those of the desirable or chosen completions.

        Args:
          filled: slots that hold a completion [*M, R, S], bool; NumPy's or JAX's.
          desirable: its label, likewise.
        """
        return filled if self.reads == "thumbs" else filled & desirable


def check_variant(name: str, variant: str, allowed: tuple[str, ...]) -> None:
    """Refuses a variant that an objective does not have.

    Raises:
      ValueError: naming the allowed ones.
    """
    if variant not in allowed:
        shown = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"variant={variant!r} is not a variant of {name}. Choose one of {shown}.")
