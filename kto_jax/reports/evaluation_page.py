"""The page of `kto_jax.evaluate`: one self-contained HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from kto_jax.evaluation.contest import Contest, Judged, conclusion
from kto_jax.evaluation.intervals import Interval
from kto_jax.evaluation.runs import HeldOut
from kto_jax.evaluation.texts import describe_texts
from kto_jax.reports.charts import COLOURS, Curve, draw_curves
from kto_jax.reports.side_by_side import card
from kto_jax.reports.template import render
from kto_jax.storage.atomic import write_text

_SHOWN = 6
_COLUMNS = (
    ("counts", "Wins / ties / losses"), ("p_value", "p"), ("controlled", "At equal lengths"),
    ("failures", "No verdict"), ("positions", "First shown wins"), ("scores", "Mean scores"),
)  # fmt: skip
"""Columns of the judges' table; one that says nothing is left out."""
_KINDS = (("wins", "wins"), ("ties", "ties"), ("losses", "losses"), ("failures", "no verdict"), ("cut", "cut"))


def write_evaluation_page(
    path: str | os.PathLike[str],
    held_out: Sequence[HeldOut],
    contests: Sequence[Contest],
    flags: Mapping[str, Any],
) -> None:
    """Writes the page atomically.

    Args:
      path: the file; its folder must exist.
      held_out: figures on held-out feedback, one for each checkpoint.
      contests: against the baseline, one for each checkpoint or for the model.
      flags: of the command.
    """
    last = contests[-1] if contests else None
    sentences = [
        conclusion(one.judgement.judge, contest.evaluated, contest.baseline, one)
        for contest in contests[-1:]
        for one in contest.judged
    ]
    judges = [_judge_row(contest, one) for contest in contests for one in contest.judged]
    html = render(
        "evaluation.html.jinja",
        title=f"Evaluation of {flags['run'] or flags['model']}",
        headline=sentences[0] if sentences else _held_out_sentence(held_out),
        sentences=sentences[1:],
        about=_about(flags, last),
        notes=list(last.notes) if last else [],
        judges=judges,
        columns=[(key, name) for key, name in _COLUMNS if any(row[key] not in ("–", "0") for row in judges)],
        held_out=[_held_out_row(figures) for figures in held_out],
        charts=[{**chart, "svg": Markup(chart["svg"])} for chart in _charts(held_out, contests)],
        texts=_texts(last) if last else [],
        names=(last.evaluated, last.baseline) if last else ("", ""),
        samples=_samples(last) if last else [],
        shown=_SHOWN,
        kinds=_KINDS,
        flags=[(name, str(value)) for name, value in flags.items() if value not in ("", ())],
    )
    write_text(path, html)


def percent(interval: Interval) -> str:
    """A share and its interval, as in "62 % (48 to 75)"."""
    if math.isnan(interval.value):
        return "–"
    ends = f" ({100 * interval.low:.0f} to {100 * interval.high:.0f})" if interval.is_known else ""
    return f"{100 * interval.value:.0f} %{ends}"


def number(interval: Interval) -> str:
    """A figure and its interval."""
    if math.isnan(interval.value):
        return "–"
    return f"{interval.value:.3g}" + (f" ({interval.low:.3g} to {interval.high:.3g})" if interval.is_known else "")


def _held_out_sentence(held_out: Sequence[HeldOut]) -> str:
    figures = held_out[-1]
    text = f"After {figures.step} steps, rewards rank a desirable completion above an undesirable one in "
    known = f" (95 % interval {100 * figures.auc.low:.0f} to {100 * figures.auc.high:.0f} %)"
    return f"{text}{100 * figures.auc.value:.0f} % of held-out comparisons{known if figures.auc.is_known else ''}."


def _about(flags: Mapping[str, Any], last: Contest | None) -> list[tuple[str, str]]:
    rows = [("evaluated", last.evaluated if last else str(flags["run"]))]
    if last:
        rows += [
            ("baseline", last.baseline),
            ("prompts", f"{len({one.key for one in last.ours})} from {flags['prompts'] or 'the held-out feedback'}"),
            ("sampling", f"temperature {flags['temperature']:g}, at most {flags['max_new_tokens']} tokens, "
                         f"{flags['num_samples']} per prompt, seed {flags['seed']}"),
            ("judges", ", ".join(one.judgement.judge for one in last.judged) or "none"),
        ]  # fmt: skip
    if last and last.divergence:
        divergence = last.divergence
        name = "KL" if flags["temperature"] == 1 else "log-ratio"
        rows.append(
            (name, f"{number(divergence.per_completion)} nats a completion, {divergence.per_token:.3g} a token")
        )
    return rows


def _judge_row(contest: Contest, one: Judged) -> dict[str, Any]:
    win, controlled = one.win, one.at_equal_lengths
    rate = win.rate
    return {
        "judge": one.judgement.judge,
        "step": "–" if contest.step is None else str(contest.step),
        "rate": percent(rate),
        "low": 100 * rate.low if rate.is_known else None,
        "high": 100 * rate.high if rate.is_known else None,
        "value": None if math.isnan(rate.value) else 100 * rate.value,
        "counts": f"{win.wins} / {win.ties} / {win.losses}",
        "p_value": f"{win.p_value:.2g}",
        "controlled": controlled.undefined or percent(controlled.rate),
        "failures": str(win.failures),
        "positions": (
            f"{percent(win.positions.first_wins)}; {100 * win.positions.contradictions:.0f} % contradict"
            + (" – biased" if win.positions.is_biased else "")
            if win.positions
            else "–"
        ),
        "scores": (f"{one.scores[0]:.3g} against {one.scores[1]:.3g}, {number(one.scores[2])}" if one.scores else "–"),
    }


def _held_out_row(figures: HeldOut) -> tuple[str, ...]:
    ranking = figures.ranking
    return (
        f"step {figures.step}",
        f"{figures.loss:.4f}",
        percent(ranking.accuracy) if ranking and ranking.accuracy else "–",
        number(figures.auc),
        "–" if math.isnan(figures.margin) else f"{figures.margin:.3g}",
        f"{ranking.calibration.error:.3f}" if ranking else "–",
        f"{figures.examples} from {figures.prompts} prompts",
    )


def _charts(held_out: Sequence[HeldOut], contests: Sequence[Contest]) -> list[dict[str, str]]:
    charts = []
    if len(contests) > 1:
        charts.append(_win_rates(contests))
    if len(held_out) > 1:
        steps = np.asarray([one.step for one in held_out], float)
        charts.append(draw_curves(
            "held_out_loss", "Held-out loss",
            [Curve("loss", "blue", steps, np.asarray([one.loss for one in held_out]), points=True)],
        ))  # fmt: skip
        charts.append(draw_curves(
            "held_out_auc", "Held-out AUC", [_curve("AUC", "blue", steps, [one.auc for one in held_out])], level=0.5,
            caption="The probability that a desirable completion has the higher reward. Chance level is 0.5.",
        ))  # fmt: skip
    if held_out and (ranking := held_out[-1].ranking):
        bins = ranking.calibration.bins
        predicted = np.asarray([one.predicted for one in bins])
        observed = np.asarray([one.observed for one in bins])
        ideal = np.asarray([0.0, 1.0])
        chart = draw_curves(
            "calibration", "Calibration",
            [
                Curve("ideal", "ink", ideal, ideal, dashed=True),
                Curve("observed", "blue", predicted, observed, points=True),
            ],
            caption="Share of desirable examples against the probability that rewards imply, in bins of equally many "
            "examples. On the dashed line, probabilities can be taken at their word.",
            unit_interval=True, x="implied probability",
        )  # fmt: skip
        charts.append(chart)
    return charts


def _win_rates(contests: Sequence[Contest]) -> dict[str, str]:
    curves = []
    for place, colour in zip(range(len(contests[0].judged)), COLOURS, strict=False):
        judged = [contest.judged[place] for contest in contests]
        steps = np.asarray([contest.step for contest in contests], float)
        curves.append(_curve(judged[0].judgement.judge, colour, steps, [one.win.rate for one in judged]))
    names = ", ".join(f"{curve.colour}: {curve.label}" for curve in curves)
    caption = f"Win rate against {contests[0].baseline}, with 95 % intervals ({names})."
    return draw_curves("win_rates", "Win rate by step", curves, caption=caption, level=0.5, unit_interval=True)


def _curve(label: str, colour: str, steps: np.ndarray, found: Sequence[Interval]) -> Curve:
    values, low, high = (np.asarray([getattr(one, name) for one in found]) for name in ("value", "low", "high"))
    return Curve(label, colour, steps, values, low, high, points=True)


def _texts(contest: Contest) -> list[tuple[str, ...]]:
    ours, theirs = (describe_texts([one.text for one in side]) for side in (contest.ours, contest.theirs))
    shares = ("empty", "distinct pairs", "duplicates", "loops")
    rows = [
        (name, *(f"{100 * side[name]:.0f} %" if name in shares else f"{side[name]:.1f}" for side in (ours, theirs)))
        for name in ours
    ]
    cut = [sum(not one.ended for one in side) / max(1, len(side)) for side in (contest.ours, contest.theirs)]
    return [*rows, ("cut", *(f"{100 * share:.0f} %" for share in cut))]


def _samples(contest: Contest) -> list[dict[str, Any]]:
    """The pairs, those with the same prompt side by side; the first judge's verdict decides the filter."""
    first = contest.judged[0].judgement if contest.judged else None
    shares = first.verdicts.shares.tolist() if first else [math.nan] * len(contest.ours)
    cards = []
    for i, (ours, theirs, share) in enumerate(zip(contest.ours, contest.theirs, shares, strict=True)):
        kind = "failures" if math.isnan(share) else "wins" if share > 0.5 else "ties" if share == 0.5 else "losses"
        cut = (not theirs.ended, not ours.ended)
        scores = ("", "")
        if first and first.scores is not None:
            scores = (f"{first.scores[1][i]:.3g}", f"{first.scores[0][i]:.3g}")
        cards.append(
            card(
                ours.prompt,
                (contest.baseline, contest.evaluated),
                (theirs.text, ours.text),
                cut=cut,
                scores=scores,
                kinds=f"{kind} {'cut' if any(cut) else ''}",
            )
        )
    return cards
