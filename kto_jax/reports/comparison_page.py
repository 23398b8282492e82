"""The page of `kto_jax.compare`: several runs on one self-contained HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from kto_jax.reports.charts import COLOURS, Curve, draw_curves, series
from kto_jax.reports.recipe import flatten
from kto_jax.reports.run_record import RunRecord
from kto_jax.reports.template import render
from kto_jax.storage.atomic import write_text

_METRICS = (
    ("loss", "Training loss", False), ("eval_loss", "Held-out loss", True), ("margin", "Reward margin", False),
    ("eval_margin", "Held-out margin", True), ("auc", "AUC", False), ("eval_auc", "Held-out AUC", True),
    ("kl", "KL estimate", False), ("grad_norm", "Gradient norm", False), ("learning_rate", "Learning rate", False),
    ("tokens_per_second", "Tokens per second", False),
)  # fmt: skip
"""Metric, title, and whether there are only a few measurements."""
_LEVELS = {"auc": 0.5, "eval_auc": 0.5, "margin": 0.0, "eval_margin": 0.0, "kl": 0.0}
_SHOWN = 6


def write_comparison(path: str | os.PathLike[str], runs: Sequence[RunRecord]) -> None:
    """Writes the page atomically.

    Args:
      path: the file; its folder must exist.
      runs: at least two, at most as many as there are colours.
    """
    colours = COLOURS[: len(runs)]
    html = render(
        "comparison.html.jinja",
        title=f"{len(runs)} runs",
        headline=conclusion(runs),
        runs=[{"name": run.name, "colour": colour} for run, colour in zip(runs, colours, strict=True)],
        summary=_summary(runs),
        differences=config_differences(runs),
        charts=[{**chart, "svg": Markup(chart["svg"])} for chart in _charts(runs, colours)],
        verdicts=_verdicts(runs),
        win_rates=_win_rates(runs),
        samples=_samples(runs),
        shown=_SHOWN,
        notes=_notes(runs),
    )
    write_text(path, html)


def conclusion(runs: Sequence[RunRecord]) -> str:
    """One sentence on which run is ahead: by the first judge that all have, else by their held-out loss."""
    for key in _keys(runs[0]):
        found = [_find(run, key) for run in runs]
        known = [one for one in found if one is not None and one.get("after") is not None]
        if len(known) < len(runs):
            continue
        share = "share" in key[1]
        order = sorted(range(len(runs)), key=lambda i: -known[i]["after"])
        first, second = known[order[0]], known[order[1]]
        shown = ", ".join(f"{runs[i].name} {_value(known[i]['after'], share)}" for i in order)
        text = f"By the judge {key[0]}, {key[1].replace(' (share)', '')} after training: {shown}."
        if any(one.get("low") is None for one in (first, second)):
            return f"{text} There are no intervals, so do not rely on it."
        if first["low"] <= second["high"]:
            return f"{text} The intervals of the changes overlap: the first two cannot be told apart."
        return f"{text} The intervals of the changes do not overlap."
    losses = {run.name: loss for run in runs if (loss := run.last("eval_loss")) is not None}
    if len(losses) == len(runs):
        listed = ", ".join(f"{name} {loss:.4g}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))
        return f"No judge read all of them. Held-out loss: {listed}; it has no interval, so do not rely on it."
    return "No judge and no held-out feedback measured all of them: nothing is known of which is better."


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The fields that are not equal in all runs, each with its value in every run."""
    flat = [dict(flatten(run.config)) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name, "–") for one in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _summary(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    def row(name: str, show: Any) -> tuple[str, list[str]]:
        return (name, [show(run) for run in runs])

    def last(metric: str, style: str) -> Any:
        return lambda run: "–" if run.last(metric) is None else format(run.last(metric), style)

    rows = [
        row("objective", lambda run: str(run.config.get("objective", {}).get("name", "–"))),
        row("steps", lambda run: f"{run.metrics[-1]['step'] if run.metrics else 0:,}"),
        row("held-out loss", last("eval_loss", ".4g")),
        row("held-out AUC", last("eval_auc", ".3f")),
        row("held-out margin", last("eval_margin", ".3g")),
        row("tokens trained on", lambda run: f"{run.total('tokens'):,.0f}"),
        row("time of the steps", lambda run: f"{run.total('seconds'):,.4g} s"),
    ]
    return [(name, values) for name, values in rows if set(values) != {"–"}]


def _charts(runs: Sequence[RunRecord], colours: Sequence[str]) -> list[dict[str, str]]:
    drawn = []
    for metric, title, few in _METRICS:
        curves = []
        for run, colour in zip(runs, colours, strict=True):
            steps, values = series(run.metrics, metric)
            if len(steps):
                curves.append(Curve(run.name, colour, steps, values[0], points=few))
        if curves:
            drawn.append(draw_curves(f"compare_{metric}", title, curves, level=_LEVELS.get(metric)))
    return drawn


def _keys(run: RunRecord) -> list[tuple[str, str]]:
    return [(verdict["judge"], verdict["figure"]) for verdict in run.verdicts]


def _find(run: RunRecord, key: tuple[str, str]) -> Any:
    return next((one for one in run.verdicts if (one["judge"], one["figure"]) == key), None)


def _value(value: float, share: bool) -> str:
    return f"{100 * value:.0f} %" if share else f"{value:.3g}"


def _verdicts(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Every figure of the judges: before, after and the interval of the change, in each run."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in _keys(run)):
        share, cells = "share" in key[1], []
        for run in runs:
            found = _find(run, key)
            if found is None or found.get("before") is None or found.get("after") is None:
                cells.append("–")
                continue
            text = f"{_value(found['before'], share)} → {_value(found['after'], share)}"
            if found.get("low") is not None:
                scale, style = (100, "+.0f") if share else (1, "+.3g")
                text += f" ({format(scale * found['low'], style)} to {format(scale * found['high'], style)})"
            cells.append(text)
        rows.append((f"{key[0]}: {key[1].replace(' (share)', '')}", cells))
    return rows


def _win_rates(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Win rates of each run's last evaluated checkpoint, by judge and baseline."""
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        for contest in run.contests[-1:]:
            for judge in contest["judges"]:
                rate = judge["rate"]
                text = "–" if rate["value"] is None else f"{100 * rate['value']:.0f} %"
                if rate["low"] is not None:
                    text += f" ({100 * rate['low']:.0f} to {100 * rate['high']:.0f}; {judge['prompts']} prompts)"
                cells.setdefault(f"{judge['judge']}, against {contest['baseline']}", {})[run.name] = text
    return [(name, [found.get(run.name, "–") for run in runs]) for name, found in cells.items()]


def _samples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The prompts that all runs completed, with what each wrote after training."""
    common = [prompt for prompt in runs[0].samples if all(prompt in run.samples for run in runs)]
    return [
        {
            "prompt": json.loads(prompt),
            "kinds": "",
            "sides": [
                {"name": run.name, "parts": [(run.samples[prompt], False)] if run.samples[prompt] else [], "tag": "ins",
                 "cut": False, "score": ""}
                for run in runs
            ],
        }
        for prompt in common
    ]  # fmt: skip


def _notes(runs: Sequence[RunRecord]) -> list[str]:
    notes = []
    if without := [run.name for run in runs if not run.verdicts]:
        notes.append(f"No judges' verdicts are in {', '.join(without)}: config.samples.judges was empty, or an earlier "
                     "version trained it.")  # fmt: skip
    if len({json.dumps(run.config.get("data", {}).get("train")) for run in runs}) > 1:
        notes.append(
            "The runs were trained on different data: their losses, margins and AUCs are of different examples."
        )
    if len({run.config.get("objective", {}).get("name") for run in runs}) > 1:
        notes.append("The runs have different objectives: their losses and margins cannot be compared, their AUCs can.")
    return notes
