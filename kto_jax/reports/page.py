"""The report of a run: one HTML file that needs nothing else, for a reader who was not there.

All text passes through Jinja's escaping; the only markup that does not is our own curves.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kto_jax.reports.charts import draw_charts, is_number, series

_SHOWN_SAMPLES = 6


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    command: str,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]] = (),
    verdicts: Sequence[Mapping[str, Any]] = (),
    figures: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes the report of a run as one HTML file; a reader never sees a half-written one.

    Args:
      path: where; the folder must exist.
      title: heading, for example the run's name.
      command: the command that made the run.
      config: the resolved configuration, nested.
      manifest: what the index says of the data. Its `rejections.histogram` (reason -> count) is drawn.
      metrics: rows of metrics.jsonl, each with a `step`. Rows of one step are merged and the last wins, so that steps
        repeated after a resume count once. Values that are missing or not finite leave a gap. Drawn, where present:
        loss, rewards_desirable, rewards_undesirable, margin, accuracy, auc, kl, kl_standard_error, z0, grad_norm,
        saturated, learning_rate, tokens_per_second, and eval_loss, eval_margin, eval_auc. Summed for the summary:
        examples, tokens, seconds.
      samples: `{prompt, before, after}`; the prompt is text or chat messages, the completions are text.
      verdicts: `{judge, figure, before, after}`, as `kto_jax.judges.judges.compare` makes them; `before` or `after` may
        be None. A figure whose name holds "share" is shown in per cent.
      figures: more tiles for the summary, name -> text or number; a name already there is replaced.
      notes: sentences for the reader, for example warnings.

    Raises:
      OSError: the file cannot be written.
    """
    text = render_report(
        title=title,
        command=command,
        config=config,
        manifest=manifest,
        metrics=metrics,
        samples=samples,
        verdicts=verdicts,
        figures=figures,
        notes=notes,
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def render_report(
    *,
    title: str,
    command: str,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]] = (),
    verdicts: Sequence[Mapping[str, Any]] = (),
    figures: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The HTML that `write_report` writes, for a destination that is no local file. Arguments as there."""
    rows = _merge_steps(metrics)
    verdict_rows = [_verdict_row(verdict) for verdict in verdicts]
    tiles = _summary(rows, verdict_rows) | {name: _text(value) for name, value in (figures or {}).items()}
    sample_rows = [{**sample, "prompt": _prompt_text(sample["prompt"])} for sample in samples]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = importlib.resources.files("kto_jax.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        command=command,
        tiles=tiles,
        verdicts=verdict_rows,
        samples=sample_rows[:_SHOWN_SAMPLES],
        more_samples=sample_rows[_SHOWN_SAMPLES:],
        charts=[{**chart, "svg": Markup(chart["svg"])} for chart in draw_charts(rows)],
        rejections=_rejection_bars(manifest.get("rejections", {}).get("histogram", {})),
        config=_flatten(config),
        manifest=_flatten(manifest),
        notes=list(notes),
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
    """A row of the judges' table: its figures as text, and as places on a bar where they are shares."""
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
    """Rows of a nested mapping: dotted name, and the value as JSON would write it."""
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
