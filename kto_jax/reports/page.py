"""The report of a run: one self-contained HTML file.

Jinja escapes all text; only our own curves are inserted as markup.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from kto_jax.evaluation.texts import describe_texts
from kto_jax.reports.captions import Captions
from kto_jax.reports.charts import draw_charts, draw_histogram, is_number, series
from kto_jax.reports.headline import headline
from kto_jax.reports.recipe import Difference, flatten
from kto_jax.reports.side_by_side import card
from kto_jax.reports.template import render
from kto_jax.reports.warnings import find_warnings
from kto_jax.storage.atomic import write_text

_SHOWN_SAMPLES = 6
_MOST_STEPS = 120
"""Rows of the table of steps."""
_STEP_COLUMNS = (
    ("loss", "loss", "{:.4g}"), ("margin", "margin", "{:.3g}"), ("auc", "AUC", "{:.2f}"), ("kl", "KL", "{:.3g}"),
    ("grad_norm", "gradient norm", "{:.3g}"), ("learning_rate", "learning rate", "{:.2g}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"), ("seconds", "seconds", "{:.2f}"),
    ("eval_loss", "held-out loss", "{:.4g}"), ("eval_auc", "held-out AUC", "{:.2f}"),
)  # fmt: skip
_SHARES = ("empty", "distinct pairs", "duplicates", "loops")
_REFERENCE_ERROR = {
    "completions": "completions measured",
    "logps_mean": "error of a completion's log-probability, mean (nats)",
    "logps_max": "error of a completion's log-probability, largest (nats)",
    "rewards_mean": "error of a reward, mean",
    "rewards_max": "error of a reward, largest",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of a run's report.

    Attributes:
      title: heading, for example the run's name.
      command: the command that started the run.
      config: the resolved configuration, nested.
      manifest: the data's manifest. Its `rejections.histogram` (reason -> count) is drawn.
      metrics: rows of metrics.jsonl, each with a `step`. Rows of the same step are merged and the last wins, so that
        steps repeated after a resume count once. A missing or non-finite value leaves a gap. docs/metrics.md explains
        the names.
      captions: texts that depend on the objective.
      about: what was trained, on what and by what, name -> text, for the top.
      samples: `{prompt, before, after}`; the prompt is text or chat messages, the completions are text. Where they are
        true, `before_cut` and `after_cut` say that a completion was cut at the longest length.
      verdicts: `{judge, figure, before, after}`, from `kto_jax.reports.samples.judge`; `before` or `after` may be None.
        A figure whose name contains "share" is shown as a percentage. `low` and `high` are the interval of the change.
      held_out: desirable and undesirable completions of an evaluation; (0, 0) if unknown.
      compared_with: what `differences` compare the run with.
      differences: settings that differ from it.
      lengths: tokens of prompts, and of desirable and undesirable completions; name -> lengths.
      num_devices: devices of the run.
      spike_deviations: `watch.spike_deviations` of the run.
      reference_error: the effect of rounding the reference on the first batch, as in reference_error.json; empty if the
        reference was not rounded.
      figures: more tiles for the summary, name -> text or number; a tile of the same name is replaced.
      notes: sentences for the reader, for example warnings.
    """

    title: str
    command: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    captions: Captions = dataclasses.field(default_factory=Captions)
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    verdicts: Sequence[Mapping[str, Any]] = ()
    reference_error: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    held_out: tuple[int, int] = (0, 0)
    compared_with: str = ""
    differences: Sequence[Difference] = ()
    lengths: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    num_devices: int = 1
    spike_deviations: float = 10.0


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the report atomically as one HTML file.

    Args:
      path: the file; its folder must exist.
      report: its content.

    Raises:
      OSError: the file cannot be written.
    """
    write_text(path, render_report(report))


def render_report(report: Report) -> str:
    """Returns the report's HTML."""
    rows = _merge_steps(report.metrics)
    verdicts = [_verdict_row(verdict) for verdict in report.verdicts]
    warnings, marks = find_warnings(rows, report.spike_deviations)
    charts = draw_charts(rows, report.captions, marks)
    return render(
        "report.html.jinja",
        title=report.title,
        headline=headline(rows, report.verdicts, report.held_out),
        about=list(report.about.items()),
        command=report.command,
        tiles=_summary(rows, verdicts) | {name: _text(value) for name, value in report.figures.items()},
        verdicts=verdicts,
        samples=[_card(sample) for sample in report.samples],
        shown=_SHOWN_SAMPLES,
        kinds=(("changed", "changed"), ("equal", "unchanged"), ("cut", "cut")),
        texts=_texts(report.samples),
        charts=_with_markup(charts),
        marks=len(marks),
        steps=_step_table(rows),
        lengths=_with_markup(_histograms(report)),
        cost=_cost(rows, report.num_devices),
        reference_error=[
            (_REFERENCE_ERROR.get(name, name), _text(value)) for name, value in report.reference_error.items()
        ],
        rejections=_rejection_bars(report.manifest.get("rejections", {}).get("histogram", {})),
        data=_data(report.manifest),
        compared_with=report.compared_with,
        differences=list(report.differences),
        config=flatten(report.config),
        manifest=flatten(report.manifest),
        notes=[*warnings, *report.notes],
    )


def _with_markup(charts: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    return [{**chart, "svg": Markup(chart["svg"])} for chart in charts]


def _card(sample: Mapping[str, Any]) -> dict[str, Any]:
    before, after = sample["before"], sample["after"]
    cut = (bool(sample.get("before_cut")), bool(sample.get("after_cut")))
    kinds = f"{'equal' if before == after else 'changed'}{' cut' if any(cut) else ''}"
    return card(sample["prompt"], ("Before", "After"), (before, after), cut=cut, kinds=kinds)


def _texts(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Figures of the completions before and after that need no judge."""
    if not samples:
        return []
    sides = [describe_texts([sample[side] for sample in samples]) for side in ("before", "after")]
    rows = [
        (name, *(f"{100 * side[name]:.0f} %" if name in _SHARES else f"{side[name]:.1f}" for side in sides))
        for name in sides[0]
    ]
    if any("after_cut" in sample for sample in samples):
        shares = [
            sum(bool(sample.get(f"{side}_cut")) for sample in samples) / len(samples) for side in ("before", "after")
        ]
        rows.append(("cut at the longest length", *(f"{100 * share:.0f} %" for share in shares)))
    return rows


def _histograms(report: Report) -> list[dict[str, str]]:
    names = {"prompts": report.lengths.get("prompts", np.zeros(0))}
    both = {name: values for name, values in report.lengths.items() if name != "prompts"}
    drawn = []
    if len(names["prompts"]):
        drawn.append(draw_histogram("prompt_lengths", "Prompts trained on", names, unit="tokens"))
    if any(len(values) for values in both.values()):
        drawn.append(
            draw_histogram(
                "completion_lengths",
                "Completions trained on",
                both,
                unit="tokens",
                caption="If the two differ, the policy may learn the length.",
            )
        )
    words = {side: np.asarray([len(sample[side].split()) for sample in report.samples]) for side in ("before", "after")}
    if len(words["before"]):
        drawn.append(draw_histogram("sample_lengths", "Completions before and after", words, unit="words"))
    return drawn


def _step_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns that the run has, and at most `_MOST_STEPS` rows, the last one among them."""
    columns = [column for column in _STEP_COLUMNS if any(is_number(row.get(column[0])) for row in rows)]
    every = max(1, -(-len(rows) // _MOST_STEPS))
    chosen = list(rows[::-1][::every][::-1])
    cells = [
        [str(row["step"]), *(show.format(row[key]) if is_number(row.get(key)) else "" for key, _, show in columns)]
        for row in chosen
    ]
    return {"names": ["step", *(name for _, name, _ in columns)], "rows": cells, "every": every}


def _cost(rows: Sequence[Mapping[str, Any]], num_devices: int) -> list[tuple[str, str]]:
    """What the steps took, in time, tokens and operations."""
    sums = {key: float(series(rows, key)[1].sum()) for key in ("seconds", "wait_seconds", "compile_seconds")}
    tokens, flops = (float(series(rows, key)[1].sum()) for key in ("tokens", "flops"))
    found = []
    if sums["seconds"]:
        found += [("steps", _duration(sums["seconds"])), ("waiting for data", _duration(sums["wait_seconds"]))]
        found += [("compilation", _duration(sums["compile_seconds"]))]
        hours = (sums["seconds"] + sums["wait_seconds"] + sums["compile_seconds"]) * num_devices / 3600
        found.append(("device hours", f"{hours:.3g}"))
    if tokens:
        found.append(("tokens trained on", f"{tokens:,.0f}"))
        found += [("tokens per second", f"{tokens / sums['seconds']:,.0f}")] if sums["seconds"] else []
    if flops:
        found.append(("floating-point operations", f"{flops:.3g}"))
    return found


def _data(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Completions and prompts of each split."""
    names = {"train": "training", "eval": "held out", "judge": "for judges", "unused": "unused"}
    return [
        (names.get(name, name), *(f"{counts[key]:,}" for key in ("desirable", "undesirable", "prompts")))
        for name, counts in manifest.get("splits", {}).items()
        if counts["desirable"] + counts["undesirable"]
    ]


def _merge_steps(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[int, dict[str, Any]] = {}
    for row in metrics:
        merged.setdefault(int(row["step"]), {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _summary(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    tiles = {"steps": f"{len(series(rows, 'loss')[0]):,}"}
    for key, name, show in (
        ("examples", "examples", _count),
        ("tokens", "tokens", _count),
        ("seconds", "training time", _duration),
    ):
        steps, values = series(rows, key)
        if len(steps):
            tiles[name] = show(values.sum())
    for key, name in (("margin", "reward margin"), ("auc", "AUC")):
        held_steps, held = series(rows, f"eval_{key}")
        steps, values = series(rows, key)
        if len(held_steps):
            tiles[f"{name}, held-out"] = f"{held[0, -1]:.2f}"
        elif len(steps):
            tiles[f"{name}, last tenth"] = f"{values[0, -max(1, len(steps) // 10) :].mean():.2f}"
    for verdict in verdicts[:1]:
        tiles[f"{verdict['judge']}: {verdict['figure']}"] = f"{verdict['before']} → {verdict['after']}".replace(
            " ", "\N{NO-BREAK SPACE}"
        )
    return tiles


def _verdict_row(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the judges' table: its figures as text, and shares also as positions on a bar."""
    before, after = verdict["before"], verdict["after"]
    share = "share" in verdict["figure"]
    known = is_number(before) and is_number(after)
    row = {
        "judge": verdict["judge"],
        "figure": re.sub(r"\s*\(share\)|\bshare of\b\s*", "", verdict["figure"]).strip(),
        "before": _figure(before, share),
        "after": _figure(after, share),
        "change": "",
        "range": "",
        "unsure": False,
        "bar": None,
    }
    if known:
        change = after - before
        size = f"{abs(100 * change):.0f} points" if share else f"{abs(change):.3g}"
        row["change"] = f"{'▲' if change > 0 else '▼' if change < 0 else '='} {size}"
        low, high = verdict.get("low"), verdict.get("high")
        if is_number(low) and is_number(high):
            scale = 100 if share else 1
            row["range"] = " to ".join(f"{scale * end:+.0f}" if share else f"{end:+.3g}" for end in (low, high))
            row["unsure"] = low <= 0 <= high
    if known and share:
        low, high = sorted((before, after))
        row["bar"] = {"left": 100 * low, "width": 100 * (high - low), "before": 100 * before, "after": 100 * after}
    return row


def _figure(value: Any, share: bool) -> str:
    if not is_number(value):
        return "–"
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%" if share else f"{value:.3g}"


def _rejection_bars(rejections: Mapping[str, int]) -> list[dict[str, Any]]:
    ordered = sorted(rejections.items(), key=lambda item: -item[1])
    return [
        {"reason": reason, "count": f"{count:,}", "width": 100 * count / max(1, ordered[0][1])}
        for reason, count in ordered
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{int(number):,}"


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
