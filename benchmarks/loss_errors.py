"""Errors of each loss against an independent float64 NumPy version: `python -m benchmarks.loss_errors`.

First table: the largest error of 1,000 random inputs, relative to max(1, |value|); "finite" refers to value and
gradient at log-probabilities of ±1e4 in all combinations. Second table: ten properties of KTO and its family, with
figures. Exit code 1 if a loss exceeds its tolerance or a property does not hold.
"""

import sys

import jax
from rich.console import Console
from rich.table import Table

from tests.losses.cases import CASES, NUM_INPUTS, TOLERANCE, errors, finite_at_extremes
from tests.losses.properties import PROPERTIES


def print_errors(console: Console) -> list[str]:
    """Prints the table of errors; returns the losses that exceed their tolerance."""
    table = Table(
        title=f"Largest error against float64 NumPy at {NUM_INPUTS:,} random inputs; allowed: {TOLERANCE:.0e}"
    )
    table.add_column("loss")
    for heading in ("value", "gradient", "finite at ±1e4"):
        table.add_column(heading, justify="right")
    missed = []
    for name, case in CASES.items():
        by_value, by_gradient = errors(case)
        finite = finite_at_extremes(case)
        within = by_value <= TOLERANCE and (by_gradient is None or by_gradient <= TOLERANCE) and finite
        if not within:
            missed.append(name)
        gradient = "none" if by_gradient is None else f"{by_gradient:.1e}"
        table.add_row(name, f"{by_value:.1e}", gradient, "yes" if finite else "NO", style="" if within else "red")
    console.print(table)
    console.print(f"Missed: {', '.join(missed)}." if missed else f"All {len(CASES)} within bounds.")
    return missed


def print_properties(console: Console) -> list[str]:
    """Prints the table of properties; returns those that do not hold."""
    table = Table("property", "holds", "measured", title="Properties, measured just now", show_lines=True)
    broken = []
    for name, measure in PROPERTIES.items():
        holds, measured = measure()
        if not holds:
            broken.append(name)
        table.add_row(name, "yes" if holds else "NO", measured, style="" if holds else "red")
    console.print(table)
    console.print(f"Do not hold: {'; '.join(broken)}." if broken else f"All {len(PROPERTIES)} hold.")
    return broken


def main() -> int:
    """Prints the tables; returns the exit code."""
    console = Console()
    missed = print_errors(console)
    broken = print_properties(console)
    return 1 if missed or broken else 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # fake devices, for the property about meshes
    sys.exit(main())
