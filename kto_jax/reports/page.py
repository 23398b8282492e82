"""The report of a run: one self-contained HTML file.

Jinja escapes all text; only our own curves are inserted as markup.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from kto_jax.reports.captions import Captions
from kto_jax.reports.charts import draw_charts, is_number, series
from kto_jax.storage.atomic import write_text

_SHOWN_SAMPLES = 6
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
      samples: `{prompt, before, after}`; the prompt is text or chat messages, the completions are text.
      verdicts: `{judge, figure, before, after}`, from `kto_jax.judges.judges.compare`; `before` or `after` may be None.
        A figure whose name contains "share" is shown as a percentage.
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
    samples: Sequence[Mapping[str, Any]] = ()
    verdicts: Sequence[Mapping[str, Any]] = ()
    reference_error: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


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
    samples = [{**sample, "prompt": _prompt_text(sample["prompt"])} for sample in report.samples]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = importlib.resources.files("kto_jax.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=report.title,
        command=report.command,
        tiles=_summary(rows, verdicts) | {name: _text(value) for name, value in report.figures.items()},
        verdicts=verdicts,
        samples=samples[:_SHOWN_SAMPLES],
        more_samples=samples[_SHOWN_SAMPLES:],
        charts=[{**chart, "svg": Markup(chart["svg"])} for chart in draw_charts(rows, report.captions)],
        reference_error=[
            (_REFERENCE_ERROR.get(name, name), _text(value)) for name, value in report.reference_error.items()
        ],
        rejections=_rejection_bars(report.manifest.get("rejections", {}).get("histogram", {})),
        config=_flatten(report.config),
        manifest=_flatten(report.manifest),
        notes=list(report.notes),
    )


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
        "bar": None,
    }
    if known:
        change = after - before
        size = f"{abs(100 * change):.0f} points" if share else f"{abs(change):.3g}"
        row["change"] = f"{'▲' if change > 0 else '▼' if change < 0 else '='} {size}"
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


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns rows of (dotted name, value as JSON) of a nested mapping."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            rows.append((f"{prefix}{key}", text))
    return rows


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


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
