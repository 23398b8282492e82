"""The win rate at equal lengths (Dubois et al., 2024, arXiv 2404.04475): judges prefer longer completions.

    logit P(win) = θ + φ · tanh(Δ / std(Δ)),        win rate at equal lengths = σ(θ)

Δ is the number of characters by which the evaluated completion is longer. As AlpacaEval's offline variant, without its
term for the difficulty of its own prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from kto_jax.evaluation.intervals import Interval, statistic_interval

_INVERSE_PENALTY = 10.0
"""scikit-learn's C: a weak pull of φ to 0, without which a perfect fit has no finite θ. θ is not pulled."""


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal lengths.

    Attributes:
      rate: σ(θ); NaN if it is undefined.
      effect: φ: how much the log-odds of a win rise if the completion is much longer.
      undefined: why there is no rate; empty if there is one.
    """

    rate: Interval
    effect: float = math.nan
    undefined: str = ""


def length_controlled(
    shares: Float[np.ndarray, " N"],
    extra_characters: Float[np.ndarray, " N"],
    prompts: Sequence[Hashable],
    *,
    draws: int = 500,
    seed: int = 0,
) -> LengthControlled:
    """The win rate that the evaluated model would have if its completions were as long as the baseline's.

    Args:
      shares: share of the win of each pair, as `Verdicts.shares`, all finite.
      extra_characters: length of the evaluated completion less that of the baseline's.
      prompts: the prompt of each pair; the bootstrap draws prompts.
      draws: bootstrap samples.
      seed: of the samples.
    """
    if len(shares) == 0:
        return LengthControlled(Interval(math.nan), undefined="no verdict could be read")
    spread = float(np.std(extra_characters))
    if spread == 0:
        return LengthControlled(Interval(math.nan), undefined="all pairs differ by the same length")
    if np.min(shares) == np.max(shares):
        return LengthControlled(Interval(math.nan), undefined="all pairs have the same verdict")
    length = np.tanh(extra_characters / spread)

    def rate(weights: np.ndarray) -> float:
        return 1 / (1 + math.exp(-_fit(shares, length, weights)[0]))

    return LengthControlled(
        statistic_interval(rate, prompts, draws=draws, seed=seed), effect=_fit(shares, length, np.ones(len(shares)))[1]
    )


def _fit(shares: np.ndarray, length: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """θ and φ; a pair whose share is s is a win of weight s and a loss of weight 1 − s."""
    # Imported here because it takes a second, and most commands fit nothing.
    from sklearn.linear_model import LogisticRegression

    is_win = np.repeat([1, 0], len(shares))
    both = np.concatenate([weights * shares, weights * (1 - shares)])
    if not (both[is_win == 1].any() and both[is_win == 0].any()):  # of a bootstrap sample
        return (math.copysign(30.0, both[is_win == 1].sum() - both[is_win == 0].sum()), 0.0)
    kept = both > 0
    # Newton's method suits two parameters: 7 times as fast as the default, and closer to the optimum.
    model = LogisticRegression(C=_INVERSE_PENALTY, solver="newton-cholesky", tol=1e-8, max_iter=500)
    model.fit(np.tile(length, 2)[kept, None], is_win[kept], both[kept])
    return float(model.intercept_[0]), float(model.coef_[0, 0])
