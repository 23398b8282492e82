"""Compares runs: settings, curves, judges' verdicts and samples on one page.

python -m kto_jax.compare runs/a runs/b
python -m kto_jax.compare runs/a runs/b runs/c --out=comparison.html

It reads what the runs left in their folders, also while they are trained, and needs neither models nor feedback. Win
rates are shown if kto_jax.evaluate measured them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kto_jax.command import FINISHED, run_command
from kto_jax.config import ConfigError
from kto_jax.config.packages import require


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    run: tuple[str, ...] = ()
    """The folder of a run, also in a bucket; two to seven. "--run=" may be left out."""
    out: str = "comparison.html"
    """The page to write."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 if a run cannot be read."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return run_command(compare, Options, str(__doc__), list(_with_flags(arguments)))


def _with_flags(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with "--run=" before each folder that is given without it."""
    is_value = False
    for argument in arguments:
        yield argument if is_value or argument.startswith("-") else f"--run={argument}"
        is_value = argument in ("--run", "--out")


def compare(options: Options) -> int:
    """Writes the page and prints what it says.

    Raises:
      ConfigError: there are too few or too many runs, or one cannot be read.
    """
    require("matplotlib", "kto_jax.compare", "compare the runs' metrics.jsonl yourself")
    from kto_jax.reports.charts import COLOURS
    from kto_jax.reports.comparison_page import conclusion, write_comparison
    from kto_jax.reports.run_record import read_runs

    if not 2 <= len(options.run) <= len(COLOURS):
        raise ConfigError(
            f"{len(options.run)} runs were given. Allowed: 2 to {len(COLOURS)}. Write kto_jax.compare RUN RUN."
        )
    runs, out = read_runs(options.run), Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(out, runs)
    print(conclusion(runs))
    print(f"see {out}")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
