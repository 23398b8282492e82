"""Errors of each preset of online training against float64 numbers: `python -m benchmarks.online_errors`.

Six completions of two prompts go the way of a round, in float32: rewards become advantages, then loss and gradient.
The float64 numbers are worked out independently, from the formulas of the papers. Errors are relative to
max(1, |value|). Exit code 1 if one exceeds its tolerance.
"""

import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.objectives.presets import CASES, TOLERANCE, differences


def main() -> int:
    """Prints the table; returns the exit code."""
    table = Table(title=f"Largest error against float64 NumPy; allowed: {TOLERANCE:.0e}")
    table.add_column("preset")
    for heading in ("loss", "gradient", "gradient of values"):
        table.add_column(heading, justify="right")
    missed = 0
    for name in CASES:
        errors = [float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))) for a, b in differences(name)]
        within = max(errors) <= TOLERANCE
        missed += not within
        shown = [f"{error:.1e}" for error in errors]
        table.add_row(name, *shown[:2], shown[2] if name.startswith("ppo") else "none", style="" if within else "red")
    console = Console()
    console.print(table)
    console.print(f"{len(CASES) - missed} of {len(CASES)} are within the tolerance", style="red" if missed else "green")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
