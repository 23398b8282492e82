"""Checks a run or a model for damaged files: python -m kto_jax.verify --run=runs/mine

Everything is read and compared with the digests that were written with it: the settings, the tokenizer, metrics.jsonl,
the checkpoints of all steps, the frozen reference, policy/, adapter/ and exports/. Nothing is changed.

Exit codes: 0 nothing is damaged, 1 something is, 2 the command or the folder cannot be used.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from kto_jax.command import FAILED, FINISHED, run_command
from kto_jax.config import ConfigError
from kto_jax.storage.fetch import local_path
from kto_jax.storage.run_place import fetched
from kto_jax.training.verification import DAMAGED, READABLE, verify_model, verify_run


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    run: str = ""
    """The folder of a run, also in a bucket (gs://, s3://). This or --model is required."""
    model: str = ""
    """An exported model: a Hugging Face directory, a folder of adapters, a .gguf file or a Hub id; directories also in
    a bucket."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(verify, Options, str(__doc__), arguments)


def verify(options: Options) -> int:
    """Prints what is found, one line for each part; returns the exit code.

    Raises:
      ConfigError: a flag or the folder cannot be used.
      TransientError: a bucket or the Hub cannot be reached.
    """
    if bool(options.run) == bool(options.model):
        raise ConfigError(
            f"--run={options.run!r} and --model={options.model!r} were given. Allowed: one of them. Set --run to the "
            "folder of a run, or --model to an exported model."
        )
    # The accelerators may be in use by the run.
    jax.config.update("jax_platforms", "cpu")
    if options.run:
        findings = verify_run(Path(fetched(options.run, checkpoints=True)))
    else:
        findings = verify_model(local_path(options.model))
    counts = collections.Counter[str]()
    for finding in findings:
        counts[finding.state] += 1
        print(f"{finding.part:<28} {finding.state:<11} {finding.detail}".rstrip(), flush=True)
    readable = f"; {counts[READABLE]} can be read, and have no digests to compare" if counts[READABLE] else ""
    print(f"{counts[DAMAGED]} of {counts.total()} parts are damaged{readable}")
    return FAILED if counts[DAMAGED] else FINISHED


if __name__ == "__main__":
    sys.exit(main())
