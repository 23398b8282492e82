"""How far each loss is from its independent float64 NumPy version: `python -m benchmarks.loss_errors`.

Errors are relative to max(1, |value|), the largest of 1,000 random inputs; "finite" is said of value and gradient with
log-probabilities of ±1e4 in all combinations. Exit code 1 when any loss misses.
"""

import sys

from rich.console import Console
from rich.table import Table

from tests.losses.cases import CASES, NUM_INPUTS, TOLERANCE, errors, finite_at_extremes


def main() -> int:
    """Prints the table; returns the exit code."""
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
        if not (by_value <= TOLERANCE and (by_gradient is None or by_gradient <= TOLERANCE) and finite):
            missed.append(name)
        gradient = "none" if by_gradient is None else f"{by_gradient:.1e}"
        table.add_row(
            name, f"{by_value:.1e}", gradient, "yes" if finite else "NO", style="red" if missed[-1:] == [name] else ""
        )
    console = Console()
    console.print(table)
    console.print(f"Missed: {', '.join(missed)}." if missed else f"All {len(CASES)} within bounds.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
