"""Means with intervals, clustered by prompt.

Completions of one prompt are not independent, so the bootstrap draws prompts, not completions.

>>> mean_interval([1.0, 1.0, 0.5, 0.0] * 25, range(100)).value
0.625
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

DRAWS = 10_000
"""Bootstrap samples of an interval."""
_LEVEL = 0.95
_CHUNK = 2**22
"""Numbers that a part of the bootstrap samples may take."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; the ends are NaN where there is none, as with a single prompt."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside of the interval; False if there is none."""
        return self.is_known and not self.low <= value <= self.high


def clusters_of(names: Iterable[Hashable]) -> Int[np.ndarray, " N"]:
    """The number of each value's cluster, from 0 in the order of their first member."""
    number: dict[Hashable, int] = {}
    return np.asarray([number.setdefault(name, len(number)) for name in names], np.int64)


def cluster_means(values: Sequence[float] | np.ndarray, prompts: Iterable[Hashable]) -> Float[np.ndarray, " G"]:
    """The mean of each prompt's values."""
    sums, counts = _sums(values, prompts)
    return sums / counts


def mean_interval(
    values: Sequence[float] | np.ndarray,
    prompts: Iterable[Hashable],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The mean of some values and its interval: bias-corrected, accelerated bootstrap (BCa) over prompts.

    If all prompts have the same mean v, no bootstrap sample differs. The interval then has the largest share of other
    prompts that G equal ones do not exclude, 1 − 0.025^(1/G) (Clopper and Pearson, 1934), at either bound.

    Args:
      values: at least one, finite.
      prompts: the prompt of each value; any hashable.
      bounds: least and largest possible value; None if there are none.
      draws: bootstrap samples.
      seed: of the samples.

    Returns:
      The mean over all values; without an interval if there is only one prompt.

    Raises:
      ValueError: there are no values.
    """
    sums, counts = _sums(values, prompts)
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(value)
    means = sums / counts
    if np.ptp(means) == 0:
        return _if_all_agree(value, len(means), bounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # its ends are NaN, which is handled below
        found = stats.bootstrap(
            (sums, counts),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            n_resamples=draws,
            batch=max(1, _CHUNK // len(sums)),
            vectorized=True,
            paired=True,
            confidence_level=_LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def statistic_interval(
    statistic: Callable[[Float[np.ndarray, " N"]], float],
    prompts: Iterable[Hashable],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    draws: int = 500,
    seed: int = 0,
) -> Interval:
    """Any statistic of weighted values and its interval: bias-corrected, accelerated bootstrap (BCa) over prompts.

    Args:
      statistic: weights of the values -> the figure, NaN where it has none; all weights of a prompt are equal.
      prompts: the prompt of each value.
      bounds: as for `mean_interval`, for a statistic that no sample changes.
      draws: bootstrap samples; those without a figure are left out.
      seed: of the samples.
    """
    clusters = clusters_of(prompts)
    count = int(clusters.max()) + 1 if len(clusters) else 0
    value = float(statistic(np.ones(len(clusters)))) if count else math.nan
    if count < 2 or not math.isfinite(value):
        return Interval(value)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    found = np.asarray([statistic(row[clusters].astype(float)) for row in weights])
    found = found[np.isfinite(found)]
    if not len(found):
        return Interval(value)
    if np.ptp(found) == 0:
        return _if_all_agree(value, count, bounds)
    without = np.asarray([statistic((clusters != left_out).astype(float)) for left_out in range(count)])
    return Interval(value, *(float(end) for end in np.quantile(found, _ends(value, found, without))))


def _ends(value: float, found: np.ndarray, without: np.ndarray) -> Float[np.ndarray, " 2"]:
    """Which quantiles of the bootstrap samples an interval ends at (Efron, 1987).

    Args:
      value: the statistic.
      found: the statistic of each bootstrap sample, not all equal.
      without: the statistic without each prompt; NaN where it has no figure.
    """
    below = (np.sum(found < value) + np.sum(found == value) / 2) / len(found)
    bias = stats.norm.ppf(np.clip(below, 1 / len(found), 1 - 1 / len(found)))
    without = without[np.isfinite(without)]
    influence = without.mean() - without if len(without) else np.zeros(1)
    spread = float(np.sum(influence**2))
    acceleration = np.sum(influence**3) / (6 * spread**1.5) if spread else 0.0
    tails = bias + stats.norm.ppf(((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return stats.norm.cdf(bias + tails / (1 - acceleration * tails))


def _if_all_agree(value: float, count: int, bounds: tuple[float, float] | None) -> Interval:
    other = 1 - ((1 - _LEVEL) / 2) ** (1 / count)
    low, high = bounds or (value, value)
    return Interval(value, value - other * (value - low), value + other * (high - value))


def sign_test(values: Sequence[float] | np.ndarray, prompts: Iterable[Hashable], *, middle: float = 0.5) -> float:
    """The exact two-sided p-value of the sign test over prompts; prompts at the middle say nothing.

    Args:
      values: at least one.
      prompts: the prompt of each value.
      middle: what neither side is better at.

    Returns:
      The probability of prompts on one side as unequal as these, or more, if both sides are equally likely; 1 if all
      are at the middle.
    """
    means = cluster_means(values, prompts)
    above, below = int(np.sum(means > middle)), int(np.sum(means < middle))
    return float(stats.binomtest(above, above + below, 0.5).pvalue) if above + below else 1.0


def _sums(
    values: Sequence[float] | np.ndarray, prompts: Iterable[Hashable]
) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """The sum of each prompt's values, and their number."""
    found, clusters = np.asarray(values, float), clusters_of(prompts)
    if not len(found):
        raise ValueError("there are no values; give at least one.")
    if len(found) != len(clusters):
        raise ValueError(
            f"{len(found)} values were given with {len(clusters)} prompts; give one prompt for each value."
        )
    return np.bincount(clusters, found), np.bincount(clusters).astype(float)
