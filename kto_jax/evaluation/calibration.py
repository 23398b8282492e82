"""How well rewards tell desirable completions from undesirable ones, on held-out feedback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from kto_jax.evaluation.intervals import Interval, mean_interval, statistic_interval

_BINS = 10


@dataclasses.dataclass(frozen=True)
class Bin:
    """Examples of similar predicted probability.

    Attributes:
      predicted: mean predicted probability that the example is desirable.
      observed: share that is desirable.
      examples: how many there are.
    """

    predicted: float
    observed: float
    examples: int


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether predicted probabilities agree with observed shares.

    Attributes:
      error: mean difference between predicted and observed, weighted by examples (expected calibration error).
      brier: mean squared difference between probability and label.
      bins: at most ten, of equally many examples.
    """

    error: float
    brier: float
    bins: tuple[Bin, ...]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How rewards separate labels.

    Attributes:
      accuracy: share of thumbs on their side of the reference point, or of pairs whose chosen completion is ahead.
      auc: probability that a desirable completion has the higher reward; NaN without both labels.
      calibration: of σ(gain), or of σ(margin) for pairs.
    """

    accuracy: Interval
    auc: Interval
    calibration: Calibration


def rank_thumbs(
    rewards: Float[np.ndarray, " N"],
    gains: Float[np.ndarray, " N"],
    desirable: Bool[np.ndarray, " N"],
    prompts: Sequence[Hashable],
) -> Ranking:
    """The ranking of single completions.

    Args:
      rewards: of each completion.
      gains: rewards less the reference point; their sign is the prediction, σ of them the probability.
      desirable: labels.
      prompts: of each.
    """
    right = np.where(desirable, gains > 0, gains < 0).astype(float)
    return Ranking(
        mean_interval(right, prompts), auc_interval(rewards, desirable, prompts), calibrate(_sigmoid(gains), desirable)
    )


def rank_pairs(
    chosen: Float[np.ndarray, " N"], rejected: Float[np.ndarray, " N"], prompts: Sequence[Hashable]
) -> Ranking:
    """The ranking of pairs, from the rewards of their two completions.

    The pairs are calibrated as predictions of which completion is preferred, each in both orders, because in one order
    the answer would always be the first.
    """
    margins = chosen - rejected
    both = np.concatenate([chosen, rejected])
    labels = np.repeat([True, False], len(chosen))
    return Ranking(
        mean_interval((margins > 0).astype(float), prompts),
        auc_interval(both, labels, [*prompts, *prompts]),
        calibrate(_sigmoid(np.concatenate([margins, -margins])), labels),
    )


def auc_interval(
    rewards: Float[np.ndarray, " N"], desirable: Bool[np.ndarray, " N"], prompts: Sequence[Hashable]
) -> Interval:
    """The area under the ROC curve with its interval; NaN without both labels."""
    # Not scikit-learn's, which takes 4 ms for each of the bootstrap's samples.
    _, ranks = np.unique(rewards, return_inverse=True)

    def auc(weights: np.ndarray) -> float:
        good, bad = (np.bincount(ranks, weights * labels) for labels in (desirable, ~desirable))
        pairs = good.sum() * bad.sum()
        below = np.cumsum(bad) - bad / 2  # those with an equal reward count half
        return float(good @ below / pairs) if pairs else math.nan

    return statistic_interval(auc, prompts)


def calibrate(probabilities: Float[np.ndarray, " N"], desirable: Bool[np.ndarray, " N"]) -> Calibration:
    """Compares probabilities with labels, in bins of equally many examples."""
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, min(_BINS, len(order))) if len(part)]
    bins = tuple(Bin(float(np.mean(probabilities[part])), float(np.mean(desirable[part])), len(part)) for part in parts)
    error = sum(one.examples * abs(one.predicted - one.observed) for one in bins) / max(1, len(order))
    return Calibration(float(error), float(np.mean((probabilities - desirable) ** 2)), bins)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))
