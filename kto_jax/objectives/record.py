"""The record that an objective is: what it reads, its reference point and its loss, over packed slots."""

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
class Objective:
    """What is minimised.

    Attributes:
      reads: "thumbs": each completion is an example; "desirable": each desirable one; "pairs": a chosen and a rejected
        completion of one prompt, in the slots 2k and 2k + 1, are one.
      loss: (completions of a microbatch, reference point, state) -> one loss per slot [R, S]; of pairs, in the slot of
        the chosen completion.
      rewards: completions -> the implied reward of each, for the figures.
      uses_reference: whether log-ratios are taken; without, no reference is held.
      first_pass: which rows of the global batch are read, without gradient, before any loss: "none", "unmatched" (each
        prompt with an unrelated completion) or "matched".
      reference_point: completions of the first pass [M, R, S] -> a scalar, or one number per slot.
      reference_reward: (reference point, state) -> what the rewards of thumbs are gains and losses against.
      saturates: whether the value of a gain is its sigmoid.
      initial_state: numbers that live through the run, by name.
      next_state: (state, rewards of the batch [M, R, S], which count) -> the state of the next step.
      scalar_head: what the model has beside its output head: "none", a "reward" head in place of it, or a "value" head.
      needs_both_labels: of thumbs, whether examples of one label alone are refused.
      controls: text before the completion of undesirable and of desirable rows.
      evaluated_as: the objective that held-out rows are measured by; None for this one.
      humanline: the range that each token's log-ratio is kept in, in nats; None keeps it as it is.
      options: the resolved options, for people to read.
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
    scalar_head: Literal["none", "reward", "value"] = "none"
    needs_both_labels: bool = True
    controls: tuple[str, str] | None = None
    evaluated_as: Objective | None = None
    humanline: tuple[float, float] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def examples(self) -> str:
        """What an example is called."""
        return {"thumbs": "thumbs", "desirable": "demonstrations", "pairs": "pairs"}[self.reads]

    def counts(self, filled: Any, desirable: Any) -> Any:
        """Which slots stand for an example of their own: all, or those of the desirable or chosen completions.

        Args:
          filled: slots that hold a completion [*M, R, S], bool; NumPy's or JAX's.
          desirable: its label, likewise.
        """
        return filled if self.reads == "thumbs" else filled & desirable
