"""A model against a baseline: their completions, what judges say of them, and one sentence on the outcome."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kto_jax.evaluation.completions import Answer, Divergence
from kto_jax.evaluation.intervals import Interval, mean_interval
from kto_jax.evaluation.length_control import LengthControlled, length_controlled
from kto_jax.evaluation.pair_judges import Judgement, PairJudge
from kto_jax.evaluation.texts import describe_texts
from kto_jax.evaluation.verdicts import WinRate, win_rate

FEW = 20
"""Below this many prompts an interval is not to be relied on."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a judge says, and the figures of it.

    Attributes:
      judgement: the verdicts.
      win: the win rate.
      at_equal_lengths: the length-controlled win rate.
      scores: mean score of the evaluated model, of the baseline, and their difference; None if the judge compares.
    """

    judgement: Judgement
    win: WinRate
    at_equal_lengths: LengthControlled
    scores: tuple[float, float, Interval] | None


@dataclasses.dataclass(frozen=True)
class Contest:
    """A model against a baseline on the same prompts.

    Attributes:
      evaluated, baseline: their names.
      step: of the evaluated checkpoint; None for a model.
      ours, theirs: completions, pair by pair.
      judged: what each judge says.
      divergence: of the evaluated model from the baseline; None if it cannot be measured.
      notes: sentences for the reader.
    """

    evaluated: str
    baseline: str
    step: int | None
    ours: Sequence[Answer]
    theirs: Sequence[Answer]
    judged: Sequence[Judged]
    divergence: Divergence | None = None
    notes: Sequence[str] = ()


def hold_contest(
    names: tuple[str, str],
    step: int | None,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    judges: Sequence[PairJudge],
    divergence: Divergence | None = None,
) -> Contest:
    """Judges the completions of two models and computes all figures.

    Raises:
      ConfigError: a judge cannot judge them.
      TransientError: a judge cannot be reached for now.
    """
    judged = [_figures(judge.judge(ours, theirs), ours, theirs) for judge in judges]
    notes = [f"The judge {one.judgement.judge} was {one.judgement.note}." for one in judged if one.judgement.note]
    cut = [sum(not one.ended for one in side) for side in (ours, theirs)]
    if any(cut):
        notes.append(
            f"{cut[0]} of {len(ours)} completions of {names[0]} and {cut[1]} of {names[1]} were cut at the longest "
            "length: judges saw no end of them. Raise --max_new_tokens if these are many."
        )
    return Contest(*names, step, ours, theirs, judged, divergence, notes)


def _figures(judgement: Judgement, ours: Sequence[Answer], theirs: Sequence[Answer]) -> Judged:
    read = judgement.verdicts.is_read
    keys = [one.key for one, known in zip(ours, read, strict=True) if known]
    extra = np.asarray([len(a.text) - len(b.text) for a, b in zip(ours, theirs, strict=True)], float)[read]
    controlled = length_controlled(judgement.verdicts.shares[read], extra, keys)
    scores = None
    if judgement.scores is not None and len(keys):
        a, b = judgement.scores[0][read], judgement.scores[1][read]
        scores = (float(a.mean()), float(b.mean()), mean_interval(a - b, keys, bounds=None))
    return Judged(judgement, win_rate(judgement.verdicts), controlled, scores)


# ------------------------------------------------------------------------------------------------ in words


def doubts(win: WinRate) -> list[str]:
    """Why a win rate is not to be relied on; empty if nothing speaks against it."""
    found = []
    if not win.rate.is_known:
        found.append("there is no interval")
    elif win.prompts < FEW:
        found.append(f"{win.prompts} prompts are few")
    if win.failures > 0.1 * (win.pairs + win.failures):
        found.append(f"{win.failures} of {win.pairs + win.failures} verdicts could not be read")
    if win.positions and win.positions.contradictions > 0.3:
        found.append(f"the judge contradicts itself in {100 * win.positions.contradictions:.0f} % of the pairs")
    return found


def conclusion(judge: str, evaluated: str, baseline: str, judged: Judged) -> str:
    """One sentence on what a judge says, with the interval and whether to rely on it."""
    win = judged.win
    if math.isnan(win.rate.value):
        return f"{judge} gave no verdict that could be read on {evaluated} and {baseline}."
    rate = f"{evaluated} wins {100 * win.rate.value:.0f} % of {win.pairs} pairs against {baseline} by {judge}"
    rate += f" (95 % interval {_ends(win.rate)})" if win.rate.is_known else ""
    reasons = doubts(win)
    if reasons:
        return f"{rate}: do not rely on it yet, because {' and '.join(reasons)}."
    if not win.rate.excludes(0.5):
        return f"{rate}: the two cannot be told apart."
    better = "better" if win.rate.value > 0.5 else "worse"
    controlled = judged.at_equal_lengths.rate
    if controlled.is_known and not (controlled.low > 0.5 if better == "better" else controlled.high < 0.5):
        return f"{rate}: {better}, but length may explain it ({100 * controlled.value:.0f} % at equal lengths)."
    return f"{rate}: clearly {better}."


def _ends(interval: Interval) -> str:
    return f"{100 * interval.low:.0f} to {100 * interval.high:.0f} %"


# ------------------------------------------------------------------------------------------------ as JSON


def to_json(contest: Contest) -> dict[str, Any]:
    """All figures of a contest, for evaluation.json; what is not finite is null."""
    figures = {
        "evaluated": contest.evaluated,
        "baseline": contest.baseline,
        "step": contest.step,
        "pairs": len(contest.ours),
        "prompts": len({one.key for one in contest.ours}),
        "judges": [_judged_to_json(one) for one in contest.judged],
        "texts": {
            "evaluated": describe_texts([one.text for one in contest.ours]),
            "baseline": describe_texts([one.text for one in contest.theirs]),
        },
        "cut": [sum(not one.ended for one in side) for side in (contest.ours, contest.theirs)],
        "divergence": dataclasses.asdict(contest.divergence) if contest.divergence else None,
        "notes": list(contest.notes),
    }
    found = finite(figures)
    assert isinstance(found, dict)
    return found


def _judged_to_json(judged: Judged) -> dict[str, Any]:
    figures = {"judge": judged.judgement.judge, **dataclasses.asdict(judged.win), "pairs": judged.win.pairs}
    figures["at_equal_lengths"] = dataclasses.asdict(judged.at_equal_lengths)
    if judged.scores:
        names = ("evaluated", "baseline", "difference")
        scores = (*judged.scores[:2], dataclasses.asdict(judged.scores[2]))
        figures["scores"] = dict(zip(names, scores, strict=True))
    return figures


def finite(value: Any) -> Any:
    """Values for JSON, with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
