"""Scores completions with a reward model, from the command line.

python -m kto_jax.score --model=runs/reward --data=feedback.jsonl --out=scored.jsonl
python -m kto_jax.score --model=runs/reward --config=configs/kto_llama.py --out=scored.jsonl

Every row of --out is the row of --data with a field "score" added: train on it with config.data.format=scores. With
--config in place of --data, config.data.train is scored as training reads it, in any format, layout or mixture; each of
its completions becomes a row of its own, {prompt, completion, label, score}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from kto_jax.command import FAILED, FINISHED, run_command
from kto_jax.config import Config, ConfigError, DataConfig
from kto_jax.config.ranges import Count, Precision, Range
from kto_jax.data.rows import files
from kto_jax.data.rows.rejection import Rejection
from kto_jax.data.rows.sources import sources_of
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.devices.inference import Devices, report_devices
from kto_jax.progress import show_progress
from kto_jax.rewards.reward_model import completions_to_score, open_reward_model, score_records, score_rows
from kto_jax.storage.atomic import new_file

Scored = dict[str, Any] | Rejection


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    model: str = ""
    """The folder of a reward model's run, or a sequence classification model; also in a bucket (gs://, s3://).
    Required."""
    data: str = ""
    """What to score: a .jsonl, .json, .csv or .parquet file, also .gz or .bz2."""
    out: str = ""
    """The JSONL file to write; an existing file is replaced. Required."""
    config: Config | None = None
    """In place of --data: a recipe whose config.data.train is scored."""
    prompt_field: str = "prompt"
    """Field with the prompt: text or chat messages."""
    completion_field: str = "completion"
    """Field with the completion: text or one assistant message."""
    score_field: str = "score"
    """Field to add."""
    max_length: Annotated[int, Range(at_least=2)] | None = None
    """As config.data.max_length. Default: that of the run."""
    max_prompt_length: Count | None = None
    """As config.data.max_prompt_length. Default: that of the run."""
    batch_size: Count = 16
    """Completions scored at once."""
    dtype: Precision = "float32"
    """Dtype of the computation."""
    devices: Devices = "auto"
    """The devices that hold the model: "one", "all" of this machine, or "auto": all if they are no CPUs. Heads and
    vocabulary are split over as many devices as can share them equally, and rows over the others."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own. "none": plain text. Otherwise the path of a Jinja file."""
    eos_token: str = ""
    """What completions end in, as data.eos_token. Empty: as the run trained."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Returns:
      0 if rows were scored, 1 if none could be, 2 if the command, the data or the model cannot be used.
    """
    return run_command(score, Options, str(__doc__), arguments)


def _check_files(options: Options, feedback: DataConfig | None) -> list[files.SourceFile]:
    """The input."""
    missing = [f"--{name}" for name in ("model", "data", "out") if not getattr(options, name)]
    if feedback is not None and options.data:
        raise ConfigError("--data and --config are given; one of them says what is scored. Take one of the two out.")
    if missing and not (feedback is not None and missing == ["--data"]):
        raise ConfigError(
            f"{', '.join(missing)} not given; --model, --data (or --config) and --out are needed. Set them."
        )
    paths = [source.path for source in sources_of(feedback)] if feedback is not None else [options.data]
    found, out = [file for path in paths for file in files.expand(path)], Path(options.out)
    if out.is_dir() or (out.exists() and any(out.samefile(file.path) for file in found)):
        raise ConfigError(f"--out={out} is --data or a directory; it must be another file. Choose another --out.")
    return found


def score(options: Options) -> int:
    """Scores a file or the feedback of a recipe; returns the exit code.

    Raises:
      ConfigError: a flag, the feedback or the model cannot be used.
    """
    feedback = options.config.data if options.config else None
    found, out = _check_files(options, feedback), Path(options.out)
    keep_compiled()
    use_most_gpu_memory()
    counts = {"scored": 0, "rejected": 0}
    with show_progress() as progress:
        progress.start("reading the model")
        with open_reward_model(
            options.model,
            dtype=options.dtype,
            chat_template=options.chat_template,
            eos_token=options.eos_token,
            max_length=options.max_length,
            max_prompt_length=options.max_prompt_length,
            devices=options.devices,
        ) as model:
            report_devices(model.placed)
            progress.start("scoring completions")
            how: dict[str, Any] = {
                "batch_size": options.batch_size, "score_field": options.score_field, "on_batch": progress.advance,
            }  # fmt: skip
            data = DataConfig(
                prompt_field=options.prompt_field, completion_field=options.completion_field,
                max_length=model.max_length, max_prompt_length=model.max_prompt_length,
            )  # fmt: skip
            if feedback is None:
                rows = itertools.chain.from_iterable(map(files.read_rows, found))
                scored = score_rows(model, rows, data, **how)
            else:
                completions = completions_to_score(feedback, options.score_field)
                scored = score_records(model, completions, data, **how)
            _write(out, _readable(scored), counts)
    print(f"{counts['scored']} rows scored, {counts['rejected']} rejected", file=sys.stderr)
    return FINISHED if counts["scored"] else FAILED


def _readable(rows: Iterator[Scored]) -> Iterator[Scored]:
    try:
        yield from rows
    except OSError as error:
        raise ConfigError(f"the feedback cannot be read: {error}. Check the file and its permissions.") from error


def _write(out: Path, rows: Iterable[Scored], counts: dict[str, int]) -> None:
    """Writes the rows and counts them; if no row was scored, an existing file is kept."""
    try:
        with contextlib.suppress(_NothingScored), new_file(out) as partial, partial.open("w", encoding="utf-8") as file:
            for row in rows:
                if isinstance(row, Rejection):
                    counts["rejected"] += 1
                    print(f"{row.place}: {row.reason}", file=sys.stderr)
                else:
                    counts["scored"] += 1
                    file.write(json.dumps(row, default=str) + "\n")  # ASCII: a field may hold half a surrogate pair.
            if not counts["scored"]:
                raise _NothingScored
    except OSError as error:
        raise ConfigError(
            f"--out={out} cannot be written: {error}. Its folder must exist and have space left. Choose another --out."
        ) from error


class _NothingScored(Exception):
    """Keeps the file that was there."""


if __name__ == "__main__":
    sys.exit(main())
