"""Draws the implied value of gains and losses for each loss: `python -m kto_jax.curves --out=docs/value_curves`.

The figure of implied human value, after figure 1 of Ethayarajh et al., arXiv 2402.01306: the human Kahneman-Tversky
value, and the values that DPO, KTO, SLiC and PPO-Clip imply.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from kto_jax import values
from kto_jax.command import FINISHED, run_command
from kto_jax.config.packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID = "#1f2328", "#656d76", "#d8dee4"
_MAX_Z = 3.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of the figure.

    Attributes:
      name: the loss, or the humans, that have this value.
      formula: in z, the gain or loss; matplotlib's mathtext.
      value_fn: z -> value.
      colour: of line and label.
      label_offset: offset of the label, in points, to avoid its neighbours.
      dashed: whether the line is dashed.
    """

    name: str
    formula: str
    value_fn: Callable[[jax.Array], jax.Array]
    colour: str
    label_offset: float = 0.0
    dashed: bool = False


CURVES = (
    Curve("Kahneman–Tversky", "$z^{0.88}$ or $-2.25\\,(-z)^{0.88}$", values.kahneman_tversky, _INK, dashed=True),
    Curve("KTO", "$\\sigma(z)$", values.sigmoid, "#0969da", label_offset=1),
    Curve("DPO", "$\\log\\,\\sigma(z)$", values.log_sigmoid, "#cf222e", label_offset=5),
    Curve("SLiC", "$\\min(0,\\,z-1)$", values.slic, "#8250df", label_offset=6),
    Curve(
        "PPO-Clip",
        "$\\min(e^z,\\,1.2)$",
        functools.partial(values.ppo_clip, advantage=1.0, clip_low=0.2, clip_high=0.2),
        "#1a7f37",
        label_offset=-6,
    ),
)


def points(curve: Curve, *, num_points: int = 401) -> tuple[np.ndarray, np.ndarray]:
    """Gains and losses z in [−3, 3] and their values minus the value of 0, as drawn: [num_points] each."""
    z = np.linspace(-_MAX_Z, _MAX_Z, num_points)
    value = np.asarray(curve.value_fn(jnp.asarray(z, jnp.float32)), np.float64)
    return z, value - float(curve.value_fn(jnp.zeros(())))


def draw() -> Figure:
    """The figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.axhline(0, color=_MUTED, lw=0.8, zorder=1)
    axes.axvline(0, color=_MUTED, lw=0.8, zorder=1)
    for curve in CURVES:
        z, value = points(curve)
        style = (0, (5, 2)) if curve.dashed else "solid"
        axes.plot(z, value, color=curve.colour, lw=2.2, linestyle=style, zorder=3)
        axes.annotate(
            f"{curve.name}   {curve.formula}",
            (_MAX_Z, value[-1]),
            xytext=(8, curve.label_offset),
            textcoords="offset points",
            color=curve.colour,
            fontsize=9.5,
            va="center",
            annotation_clip=False,
        )
    _style_axes(axes)
    return figure


def _style_axes(axes: Axes) -> None:
    axes.set_xlim(-_MAX_Z, _MAX_Z)
    axes.set_ylim(-4.2, 3.2)
    axes.set_title("What a gain or a loss is worth", loc="left", color=_INK, fontsize=13, pad=12)
    axes.set_xlabel("z: reward of the completion, less the reference point", color=_MUTED, fontsize=10)
    axes.set_ylabel("value, less that of z = 0", color=_MUTED, fontsize=10)
    axes.text(-_MAX_Z + 0.12, -3.95, "losses", color=_MUTED, fontsize=10)
    axes.text(_MAX_Z - 0.12, -3.95, "gains", color=_MUTED, fontsize=10, ha="right")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=_MUTED, labelsize=9.5, length=0)
    axes.grid(color=_GRID, lw=0.6)
    axes.set_axisbelow(True)


def write(out: Path) -> tuple[Path, Path]:
    """Writes the figure.

    Args:
      out: path without an extension; its folder is created if needed.

    Returns:
      The paths of the PNG and the SVG. The same matplotlib writes the same bytes.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    require("matplotlib", "the figure", "see docs/value_curves.svg")
    import matplotlib

    out.parent.mkdir(parents=True, exist_ok=True)
    png, svg = out.with_name(out.name + ".png"), out.with_name(out.name + ".svg")
    figure = draw()
    with matplotlib.rc_context({"svg.hashsalt": "value_curves"}):
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(svg, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return png, svg


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    out: str = "docs/value_curves"
    """Where the figure goes, without .png and .svg."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(curves, Options, str(__doc__), arguments)


def curves(options: Options) -> int:
    """Writes the figure and prints where."""
    for path in write(Path(options.out)):
        print(path)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
