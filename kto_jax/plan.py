"""Will it fit, and how fast at best: `python -m kto_jax.plan --config=configs/kto_llama.py --topology=v5e:4x4`.

Compiles the training step for TPUs that are not here (extra [plan]: libtpu), or with --topology=local for the devices
that are, and prints the memory of each device, the collectives, and bounds of time and cost. Where it does not fit, it
compiles again with settings that need less. Nothing runs: all figures are the compiler's, or follow from formulas.

Flags, beside --config=FILE and --config.FIELD=VALUE as in training:
  --topology=NAME            v4, v5e, v5p, v6e or tpu7x and a size: v5e:4x4, v5p:4x4x4, of N slices N*v5e:16x16; local
  --mean_length=N            tokens of an example, prompt and completion; half of data.max_length if not given
  --mean_completion=N        tokens of its completion; half of the mean length if not given
  --price_per_chip_hour=X    adds what a million tokens cost at least, in the price's currency
  --json=FILE                writes all figures to a file as well
  --ladder=false             does not look for settings that fit

Exit codes: 0 it fits, 3 it does not, 2 the command, the configuration or the model cannot be used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
from rich.console import Console

from kto_jax.config import ConfigError, nearest
from kto_jax.planning.compile_step import Lengths, compile_step, read_subject
from kto_jax.planning.report import as_dict, show, show_ladder
from kto_jax.planning.rows_that_fit import plan_rows
from kto_jax.planning.smaller_settings import climb
from kto_jax.planning.topology import LOCAL, open_topology
from kto_jax.train import UNUSABLE, read_command

T = TypeVar("T", int, float)
FITS, DOES_NOT_FIT = 0, 3
FLAGS = ("topology", "mean_length", "mean_completion", "price_per_chip_hour", "json", "ladder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = sys.argv if arguments is None else ["plan", *arguments]
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        return plan(argv)
    except ConfigError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return UNUSABLE


def plan(argv: Sequence[str]) -> int:
    """Plans the run of a command line; returns whether it fits as an exit code.

    Raises:
      ConfigError: the command, the configuration or the model cannot be used.
    """
    given, rest = _split(argv)
    config, _ = read_command(rest)
    lengths = _lengths(given, config.data.max_length)
    price = _number(given, "price_per_chip_hour", float) if "price_per_chip_hour" in given else None
    if given.get("ladder", "true") not in ("true", "false"):
        raise ConfigError(f"--ladder={given['ladder']} is unknown. Allowed: true, false. Correct --ladder.")
    subject = read_subject(config)
    if given["topology"] != LOCAL:
        # libtpu would look for chips here, and take them from a run.
        jax.config.update("jax_platforms", "cpu")
    topology = open_topology(given["topology"])
    console = Console(highlight=False)
    if config.microbatch_rows == "auto":
        program, why = plan_rows(config, subject, topology, lengths)
        console.print(f"microbatch_rows: {program.shape.rows}; {why}", soft_wrap=True)
    else:
        program = compile_step(config, subject, topology, lengths)
    show(program, topology, lengths, price, console)
    rungs = []
    if not program.fits and given.get("ladder", "true") == "true":
        rungs = list(climb(program, subject, topology, lengths))
        show_ladder(program, rungs, console)
    if "json" in given:
        Path(given["json"]).write_text(json.dumps(as_dict(program, topology, lengths, price, rungs), indent=1) + "\n")
    return FITS if program.fits else DOES_NOT_FIT


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own flags, and the rest of the command line, which is that of training."""
    given, rest = {}, []
    for argument in argv:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("--") or name.split(".")[0] in ("config", ""):
            rest.append(argument)
        elif name in FLAGS and equals:
            given[name] = value
        else:
            raise ConfigError(
                f"{argument} is no flag, or lacks its =VALUE. {nearest(name, FLAGS)} Correct the command."
            )
    if "topology" not in given:
        raise ConfigError(
            "--topology is missing. Allowed: local, or a TPU slice such as v5e:4x4 or v5p:4x4x4. Set --topology."
        )
    return given, rest


def _lengths(given: dict[str, str], max_length: int) -> Lengths:
    total = _number(given, "mean_length", int) if "mean_length" in given else max_length // 2
    completion = _number(given, "mean_completion", int) if "mean_completion" in given else max(total // 2, 1)
    if not 2 <= total <= max_length or not 1 <= completion < total:
        raise ConfigError(
            f"--mean_length={total} and --mean_completion={completion} cannot be. Allowed: a mean length from 2 to "
            f"config.data.max_length={max_length}, and a shorter completion. Correct them."
        )
    return Lengths(total, completion)


def _number(given: dict[str, str], name: str, kind: Callable[[str], T]) -> T:
    try:
        value = kind(given[name])
        if value > 0 and value < float("inf"):
            return value
    except ValueError:
        pass
    raise ConfigError(f"--{name}={given[name]} is no number above 0. Allowed: such numbers. Correct --{name}.")


if __name__ == "__main__":
    sys.exit(main())
