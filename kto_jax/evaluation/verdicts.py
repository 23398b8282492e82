"""Win rates: what judges of pairs say of an evaluated model and a baseline.

A verdict is the evaluated model's share of the win: 1 if its completion is better, 0 if the baseline's is, 0.5 for a
tie, NaN if the judge's answer could not be read. A judge that sees the order of the two is asked in both orders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from kto_jax.evaluation.intervals import Interval, mean_interval, sign_test


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What one judge says of N pairs.

    Attributes:
      prompts: the prompt of each pair.
      shown_first: verdict with the evaluated model's completion shown first [N].
      shown_second: verdict with it shown second; None if the judge sees no order.
    """

    prompts: Sequence[Hashable]
    shown_first: Float[np.ndarray, " N"]
    shown_second: Float[np.ndarray, " N"] | None = None

    @property
    def shares(self) -> Float[np.ndarray, " N"]:
        """The verdict of each pair, averaged over both orders; NaN if either could not be read."""
        return self.shown_first if self.shown_second is None else (self.shown_first + self.shown_second) / 2

    @property
    def is_read(self) -> Bool[np.ndarray, " N"]:
        """The pairs whose verdict could be read."""
        return np.isfinite(self.shares)


@dataclasses.dataclass(frozen=True)
class Positions:
    """How much a judge depends on the order.

    Attributes:
      first_wins: share of the win that the completion shown first gets, whichever model wrote it; 0.5 without bias.
      contradictions: share of the pairs in which the judge prefers the same position in both orders.
    """

    first_wins: Interval
    contradictions: float

    @property
    def is_biased(self) -> bool:
        """Whether the interval of `first_wins` excludes 0.5."""
        return self.first_wins.excludes(0.5)


@dataclasses.dataclass(frozen=True)
class WinRate:
    """A win rate over the pairs whose verdicts could be read.

    Attributes:
      rate: mean share of the win, ties counting half; NaN if no verdict could be read.
      p_value: of the exact sign test over prompts.
      prompts: how many prompts there are.
      wins, ties, losses: pairs above, at and below 0.5.
      failures: pairs without a verdict, left out of all other figures.
      positions: None if the judge sees no order.
      standard_error: of the rate if all pairs were independent, as AlpacaEval has it; NaN with fewer than two.
    """

    rate: Interval
    p_value: float
    prompts: int
    wins: int
    ties: int
    losses: int
    failures: int
    positions: Positions | None = None
    standard_error: float = float("nan")

    @property
    def pairs(self) -> int:
        """Pairs with a verdict."""
        return self.wins + self.ties + self.losses


def win_rate(verdicts: Verdicts, *, seed: int = 0) -> WinRate:
    """The win rate of the evaluated model, with its interval.

    Args:
      verdicts: of one judge.
      seed: of the bootstrap.
    """
    read = verdicts.is_read
    shares = verdicts.shares[read]
    prompts = [prompt for prompt, known in zip(verdicts.prompts, read, strict=True) if known]
    failures = int(np.sum(~read))
    if not len(shares):
        return WinRate(Interval(float("nan")), 1.0, 0, 0, 0, 0, failures)
    return WinRate(
        rate=mean_interval(shares, prompts, seed=seed),
        p_value=sign_test(shares, prompts),
        prompts=len(set(prompts)),
        wins=int(np.sum(shares > 0.5)),
        ties=int(np.sum(shares == 0.5)),
        losses=int(np.sum(shares < 0.5)),
        failures=failures,
        positions=_positions(verdicts, prompts, seed),
        standard_error=float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else float("nan"),
    )


def _positions(verdicts: Verdicts, prompts: Sequence[Hashable], seed: int) -> Positions | None:
    if verdicts.shown_second is None:
        return None
    first, second = verdicts.shown_first[verdicts.is_read], verdicts.shown_second[verdicts.is_read]
    contradicts = ((first > 0.5) & (second < 0.5)) | ((first < 0.5) & (second > 0.5))
    first_wins = mean_interval((first + 1 - second) / 2, prompts, seed=seed)
    return Positions(first_wins, float(np.mean(contradicts)))
