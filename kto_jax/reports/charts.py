"""The curves of a run as inline SVG.

matplotlib draws them with CSS variables as colours, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kto_jax.reports.captions import Captions

Series = tuple[np.ndarray, np.ndarray]

# Placeholders that matplotlib accepts as colours; they become CSS variables, which the page's style sheet defines.
_COLOURS = {
    name: f"#0{i}0{i}0{i}"
    for i, name in enumerate(("ink", "muted", "grid", "blue", "red", "green", "violet", "orange", "teal"), start=1)
}
COLOURS = ("blue", "red", "green", "violet", "orange", "teal", "ink")
"""Colours of lines that are compared, in order."""
_MAX_POINTS = 600
_SIZE = (4.3, 2.7)
"""Inches: a chart is about this wide on a phone, so that its labels are as large as it draws them."""
_TEXT = 10.5
"""Size of all labels, in points."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of `draw_curves`.

    Attributes:
      label: its name.
      colour: one of `COLOURS`.
      steps: where it is known [n].
      values: there [n].
      low, high: ends of the values' intervals [n]; None if they have none.
      points: a few measurements, drawn as connected points and never smoothed.
      dashed: whether the line is dashed.
    """

    label: str
    colour: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    points: bool = False
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class _Line:
    key: str
    label: str
    colour: str
    dashed: bool = False
    points: bool = False
    """A few measurements, such as held-out ones: drawn as connected points."""
    exact: bool = False
    """Without noise: never smoothed."""


@dataclasses.dataclass(frozen=True)
class _Chart:
    name: str
    title: str
    caption: str
    lines: tuple[_Line, ...]
    between: tuple[str, str] = ("", "")
    """Shade the space between these two keys."""
    band: tuple[str, str] = ("", "")
    """Shade the first key plus and minus the second."""
    level: float | None = None
    unit_interval: bool = False
    from_zero: bool = False


def _charts(captions: Captions) -> tuple[_Chart, ...]:
    """The charts of a report, in order."""
    return (
        _Chart(
            "loss",
            "Loss",
            captions.loss,
            (_Line("loss", "training", "blue"), _Line("eval_loss", "held-out", "red", points=True)),
        ),
        _Chart(
            "rewards",
            "Rewards",
            captions.rewards,
            (
                _Line("rewards_desirable", captions.positive, "blue"),
                _Line("rewards_undesirable", captions.negative, "red"),
            ),
            between=("rewards_desirable", "rewards_undesirable"),
            level=0.0,
        ),
        _Chart(
            "ranking",
            f"{captions.positive.capitalize()} against {captions.negative}",
            captions.ranking,
            (
                _Line("auc", "AUC", "blue"),
                _Line("accuracy", "accuracy", "violet"),
                _Line("eval_auc", "held-out AUC", "red", points=True),
            ),
            level=0.5,
            unit_interval=True,
        ),
        _Chart(
            "kl",
            "Distance from the reference",
            captions.kl,
            (_Line("kl", "KL estimate", "blue"), _Line("z0", "z0", "ink", dashed=True)),
            band=("kl", "kl_standard_error"),
            level=0.0,
        ),
        _Chart(
            "gradient",
            "Gradient norm",
            "Before clipping. If spikes persist, the learning rate is too high.",
            (_Line("grad_norm", "gradient norm", "blue"),),
            from_zero=True,
        ),
        _Chart(
            "saturated",
            "Saturated examples",
            captions.saturated,
            (_Line("saturated", "saturated share", "violet"),),
            from_zero=True,
        ),
        _Chart(
            "rate",
            "Learning rate",
            "After warm-up and schedule.",
            (_Line("learning_rate", "learning rate", "green", exact=True),),
            from_zero=True,
        ),
        _Chart(
            "speed",
            "Speed",
            "Tokens per second of matched rows, padding left out. A dip is an evaluation, a checkpoint or a busy "
            "machine.",
            (_Line("tokens_per_second", "tokens per second", "green"),),
            from_zero=True,
        ),
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a metric can be drawn: a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(rows: Sequence[Mapping[str, Any]], *keys: str) -> Series:
    """Returns steps [n] and values [len(keys), n] of the rows in which all keys hold finite numbers."""
    chosen = [row for row in rows if all(is_number(row.get(key)) for key in keys)]
    steps = np.asarray([row["step"] for row in chosen], dtype=np.float64)
    values = np.asarray([[row[key] for row in chosen] for key in keys], dtype=np.float64)
    return steps, values


def _downsample(steps: np.ndarray, values: np.ndarray) -> Series:
    """Averages over equal bins, so that a long run stays a small file."""
    if len(steps) <= _MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), _MAX_POINTS)
    return (
        np.asarray([steps[chosen].mean() for chosen in bins]),
        np.stack([values[:, chosen].mean(axis=1) for chosen in bins], axis=1),
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the centred running mean over a fifteenth of the run; the window is truncated at both ends."""
    window = np.ones(max(1, len(values) // 15) // 2 * 2 + 1)
    if len(window) > len(values):
        return values
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw_charts(
    rows: Sequence[Mapping[str, Any]], captions: Captions, marks: Sequence[int] = ()
) -> list[dict[str, str]]:
    """Draws every chart that the run has metrics for.

    Args:
      rows: one mapping of metrics per step, in order; a missing or non-finite value leaves a gap.
      captions: texts that depend on the objective.
      marks: steps that a warning was about; each is a vertical line.

    Returns:
      Charts as `{title, caption, svg}`; the SVG is safe to inline because it contains no text of the run.
    """
    drawn = []
    for chart in _charts(captions):
        svg = _draw(chart, rows, marks)
        if svg:
            drawn.append({"title": chart.title, "caption": chart.caption, "svg": svg})
    return drawn


def draw_curves(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    caption: str = "",
    level: float | None = None,
    unit_interval: bool = False,
    x: str = "step",
) -> dict[str, str]:
    """Draws lines of several runs or models in one chart.

    Args:
      name: of its identifiers on the page.
      title: above it.
      curves: at least one; their labels are not drawn, but named by the page.
      caption: below it.
      level: value of a horizontal line.
      unit_interval: whether the axis is [0, 1].
      x: name of the horizontal axis.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        colour = _COLOURS[curve.colour]
        style: dict[str, Any] = {"linestyle": (0, (4, 2))} if curve.dashed else {}
        if curve.points or len(curve.steps) == 1:
            axes.plot(curve.steps, curve.values, color=colour, marker="o", markersize=4, lw=1.4, **style)
        else:
            steps, values = _downsample(curve.steps, curve.values[None])
            axes.plot(steps, _smooth(values[0]), color=colour, lw=1.8, **style)
        if curve.low is not None and curve.high is not None:
            axes.vlines(curve.steps, curve.low, curve.high, color=colour, lw=1.2, alpha=0.55)
    chart = _Chart(name, title, caption, (), level=level, unit_interval=unit_interval)
    _style_axes(axes, chart, x=x)
    return {"title": title, "caption": caption, "svg": _to_svg(figure, chart)}


def draw_histogram(
    name: str, title: str, groups: Mapping[str, np.ndarray], *, unit: str, caption: str = ""
) -> dict[str, str]:
    """Draws how often values occur in some groups, as shares of each group, in the order of `COLOURS`.

    Args:
      name: of its identifiers on the page.
      title: above it.
      groups: name -> values; those without values are left out.
      unit: of the values.
      caption: below it.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    present = {label: np.asarray(values, float) for label, values in groups.items() if len(values)}
    edges = np.histogram_bin_edges(np.concatenate(list(present.values())), bins=24)
    for (label, values), colour in zip(present.items(), COLOURS, strict=False):
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        axes.stairs(shares, edges, color=_COLOURS[colour], fill=True, alpha=0.16)
        axes.stairs(shares, edges, color=_COLOURS[colour], lw=1.6, label=label)
    chart = _Chart(name, title, caption, (), from_zero=True)
    _style_axes(axes, chart, x=unit)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return {"title": title, "caption": caption, "svg": _to_svg(figure, chart)}


def _draw(chart: _Chart, rows: Sequence[Mapping[str, Any]], marks: Sequence[int]) -> str:
    """Returns the chart as inline SVG; empty if the run has none of its metrics."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    if not any([_draw_line(axes, line, rows) for line in chart.lines]):
        return ""
    if all(chart.between):
        steps, values = _downsample(*series(rows, *chart.between))
        axes.fill_between(steps, _smooth(values[0]), _smooth(values[1]), color=_COLOURS["blue"], alpha=0.13, lw=0)
    if all(chart.band):
        steps, values = _downsample(*series(rows, *chart.band))
        centre, error = _smooth(values[0]), _smooth(values[1])
        axes.fill_between(steps, centre - error, centre + error, color=_COLOURS["blue"], alpha=0.22, lw=0)
    for step in marks:
        axes.axvline(step, color=_COLOURS["orange"], lw=1.1, linestyle=(0, (2, 2)), zorder=2)
    _style_axes(axes, chart)
    return _to_svg(figure, chart)


def _draw_line(axes: Axes, line: _Line, rows: Sequence[Mapping[str, Any]]) -> bool:
    steps, values = _downsample(*series(rows, line.key))
    if not len(steps):
        return False
    colour = _COLOURS[line.colour]
    if line.points or len(steps) == 1:
        axes.plot(steps, values[0], color=colour, marker="o", markersize=4, lw=1.2, label=line.label, zorder=4)
        return True
    smooth = values[0] if line.exact else _smooth(values[0])
    if smooth is not values[0] and not line.dashed:
        axes.plot(steps, values[0], color=colour, lw=0.8, alpha=0.3)
    style: dict[str, Any] = {"lw": 1.1, "linestyle": (0, (4, 2))} if line.dashed else {"lw": 1.9}
    axes.plot(steps, smooth, color=colour, label=line.label, zorder=3, **style)
    return True


def _style_axes(axes: Axes, chart: _Chart, *, x: str = "step") -> None:
    muted = _COLOURS["muted"]
    # The title names an only line.
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=3,
            frameon=False,
            labelcolor=_COLOURS["ink"],
            handlelength=1.4,
            columnspacing=1.2,
            borderaxespad=0.1,
            fontsize=_TEXT,
        )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["grid"])
    axes.tick_params(colors=muted, labelsize=_TEXT, length=0, pad=5)
    axes.grid(axis="y", color=_COLOURS["grid"], lw=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.08)
    axes.set_xlabel(x, color=muted, fontsize=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=x == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.get_offset_text().set(color=muted, fontsize=_TEXT)
    if chart.level is not None:
        axes.axhline(chart.level, color=muted, lw=0.9, zorder=1)
    if chart.unit_interval:
        axes.set_ylim(-0.03, 1.03)
    elif chart.from_zero:
        axes.set_ylim(bottom=0)


def _to_svg(figure: Figure, chart: _Chart) -> str:
    buffer = io.StringIO()
    # Text stays text and uses the page's font. The salt makes identifiers, and therefore the bytes, deterministic.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Identifiers are global to the page, and every matplotlib figure has an `axes_1`.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{chart.name}-", svg)
    for name, placeholder in _COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*"', r"\1\2", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{chart.title}" ', 1)
