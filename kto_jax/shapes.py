"""The legend of shape letters, and the batch that the data layer passes to the step.

| letter | what it counts |
|---|---|
| B | examples of a batch |
| M | microbatches of a step |
| R | packed rows of a microbatch |
| L | tokens of a packed row |
| C | completion tokens of a packed row: the only positions whose log-probability is computed |
| S | slots of a packed row, each of which holds at most one example |
| T | tokens, flattened over rows |
| V | vocabulary |
| D | model (residual stream) |
| N, K, H | attention heads, key/value heads, head dimension |
| F | feed-forward |
| E | experts of a layer, if it has several |

A suffix such as `x_TD` names the axes of an array, in order.
"""

from __future__ import annotations

import dataclasses
from typing import Any as Array  # NumPy's in the data layer, JAX's once a batch is placed on devices.

import jax
from jaxtyping import Bool, Float, Int


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count` and at least 1. Rounding sizes so compiles fewer programs."""
    return 1 << max(count - 1, 0).bit_length()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Sequences packed into rows of one fixed shape, several to a row.

    One row that holds prompt `10 11`, completion `20 2` and prompt `12`, completion `21 22 2` (EOS is 2):

        tokens           10 11 20  2 12 21 22  2  0  0
        segment_ids       1  1  1  1  2  2  2  2  0  0      0 is padding
        positions         0  1  2  3  0  1  2  3  0  0
        predictors        1  2  4  5  6                     where the hidden state that predicts is read
        targets          20  2 21 22  2                     what it should predict
        target_segments   1  1  2  2  2                     0 is padding
        filled            True True False ...               which of the S slots hold an example

    Attributes:
      tokens: token ids.
      segment_ids: 1-based slot of every token; 0 is padding. Attention never crosses segments.
      positions: position of every token inside its own sequence, from 0.
      predictors: for each completion token, the index in the row of the token before it.
      targets: the completion tokens' ids.
      target_segments: 1-based slot of every completion token; 0 is padding.
      filled: slots that hold an example.
    """

    tokens: Int[Array, "*M R L"]
    segment_ids: Int[Array, "*M R L"]
    positions: Int[Array, "*M R L"]
    predictors: Int[Array, "*M R C"]
    targets: Int[Array, "*M R C"]
    target_segments: Int[Array, "*M R C"]
    filled: Bool[Array, "*M R S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """What online training knew of each completion token before the update; 0 in padding.

    Attributes:
      old_logps: log-probability under the policy that sampled it, in nats.
      reference_logps: likewise, under the reference.
      advantages: its advantage.
      values: the value head's estimate before it; 0 without one.
      returns: target of the value head; 0 without one.
    """

    old_logps: Float[Array, "*M R C"]
    reference_logps: Float[Array, "*M R C"]
    advantages: Float[Array, "*M R C"]
    values: Float[Array, "*M R C"]
    returns: Float[Array, "*M R C"]


SAMPLED = tuple(field.name for field in dataclasses.fields(Sampled))
"""The figures of a sampled token, in the order in which the index stores them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Packed rows, with the label, score and reference log-probability of the completion in each slot.

    Attributes:
      rows: the sequences.
      desirable: thumbs-up or thumbs-down.
      scores: rating; 0 if the data has none.
      reference_logps: log-probability under the reference, in nats, if it was computed before training; else None.
      sampled: figures of the tokens, for objectives that read them; else None.
    """

    rows: PackedRows
    desirable: Bool[Array, "*M R S"]
    scores: Float[Array, "*M R S"]
    reference_logps: Float[Array, "*M R S"] | None = None
    sampled: Sampled | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeedbackBatch:
    """One global batch of feedback, packed into microbatches of one fixed shape.

    `matched` holds each prompt with its own completion. `unmatched` holds each prompt with the completion of the next
    example of the global batch whose prompt differs, to estimate the KL reference point. For objectives on pairs, slots
    2k and 2k + 1 of a row hold the chosen and the rejected completion of one prompt, in both.

    Attributes:
      matched: the examples.
      desirable: thumbs-up or thumbs-down of the example in each slot of `matched`.
      weights: weight of the example in each slot of `matched`; 0 in empty slots.
      scores: rating of the example in each slot of `matched`; 0 in empty slots, and if the data has no ratings.
      unmatched: each prompt with an unrelated completion; examples without a partner are absent. M is 0 here for
        objectives that do not use it.
      num_matched: number of leading microbatches of `matched` that are not empty; the rest is padding.
      num_unmatched: the same for `unmatched`.
      matched_reference: log-probability of each slot of `matched` under the reference, in nats, if it was precomputed;
        None if the step evaluates the reference.
      unmatched_reference: the same for `unmatched`.
      sampled: figures of the completion tokens of `matched`, for objectives that read them; else None.
    """

    matched: PackedRows
    desirable: Bool[Array, "M R S"]
    weights: Float[Array, "M R S"]
    scores: Float[Array, "M R S"]
    unmatched: PackedRows
    num_matched: Int[Array, ""]
    num_unmatched: Int[Array, ""]
    matched_reference: Float[Array, "M R S"] | None = None
    unmatched_reference: Float[Array, "M R S"] | None = None
    sampled: Sampled | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per-token quantities of the completions in packed rows.

    Attributes:
      policy: log-probability under the policy, in nats.
      reference: likewise, under the reference; under the policy that sampled, for objectives that read `sampled`.
      values: the value head's estimate before each token; 0 without one.
      segments: 1-based slot of every token; 0 is padding.
      sampled: what was known before the update, for objectives that read it; else None.
    """

    policy: Float[Array, "R C"]
    reference: Float[Array, "R C"]
    values: Float[Array, "R C"]
    segments: Int[Array, "R C"]
    sampled: Sampled | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What the routers of a mixture of experts did with the tokens of packed rows; padding does not count.

    Attributes:
      counts: how many tokens chose each expert.
      probabilities: sum over the tokens of each expert's probability.
      squared_normalizers: sum over the tokens of the squared log-sum-exp of the router's logits.
      entropies: sum over the tokens of the entropy of the router's probabilities, in nats.
    """

    counts: Float[Array, "*layers E"]
    probabilities: Float[Array, "*layers E"]
    squared_normalizers: Float[Array, "*layers"]
    entropies: Float[Array, "*layers"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """The models' outputs for the completion in each slot: the inputs of an objective. Empty slots hold 0.

    Attributes:
      policy: log-probability under the policy, summed over the completion's tokens, in nats; for a reward model, the
        completion's reward. With humanline, the reference's plus the tokens' clamped log-ratios.
      reference: log-probability under the reference; 0 if there is none.
      likelihood: log-probability under the policy, without humanline.
      lengths: number of tokens of the completion.
      desirable: thumbs-up or thumbs-down.
      scores: rating of the example; 0 if the data has none.
      filled: slots that hold an example.
      tokens: per-token quantities, for models with a value head and objectives that read them; else None.
      routed: what the policy's routers did, if it is a mixture of experts; else None.
      figures: sums over the tokens of each completion, by name, for the metrics; None if the objective has none.
    """

    policy: Float[Array, "*M R S"]
    reference: Float[Array, "*M R S"]
    likelihood: Float[Array, "*M R S"]
    lengths: Float[Array, "*M R S"]
    desirable: Bool[Array, "*M R S"]
    scores: Float[Array, "*M R S"]
    filled: Bool[Array, "*M R S"]
    tokens: TokenScores | None = None
    routed: RouterSums | None = None
    figures: dict[str, Float[Array, "*M R S"]] | None = None
