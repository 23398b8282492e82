"""Exports a checkpoint of a run: as a model, as adapters, as a GGUF file, to the Hub.

python -m kto_jax.export --run=runs/mine --step=best
python -m kto_jax.export --run=runs/lora --merge --dtype=bfloat16 --to=out
python -m kto_jax.export --run=runs/mine --gguf=q8_0
HF_TOKEN=... python -m kto_jax.export --run=runs/mine --push=org/name

A run of adapters is exported as adapters, unless --merge or --gguf asks for a whole model. One device is used.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kto_jax.command import FINISHED, run_command
from kto_jax.config import ConfigError
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.exports.checkpoint import Exported, export_checkpoint
from kto_jax.exports.gguf_file import write_gguf
from kto_jax.exports.push import push_folder
from kto_jax.storage.bucket import is_bucket
from kto_jax.storage.folders import scratch_folder
from kto_jax.storage.run_place import fetched


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    run: str = ""
    """The folder of a run, also in a bucket (gs://, s3://). Required."""
    step: str = "last"
    """Checkpoint: "last", "best" (of the held-out figure config.evaluation.metric) or a number."""
    to: str = ""
    """Folder to write; an earlier export there is replaced. Default: RUN/exports/STEP; a run in a bucket
    has none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights. "auto": that of the run's policy/."""
    merge: bool = False
    """Export a run of adapters as a whole model."""
    gguf: Literal["", "q8_0", "f16", "bf16", "f32"] = ""
    """Write one GGUF file with its tokenizer instead, with matrices of this kind."""
    strict: bool = False
    """Refuse a damaged last checkpoint, instead of exporting the one before it with a warning."""
    push: str = ""
    """Repository org/name of the Hub to upload the folder to; the token is read from HF_TOKEN."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 if the command or the run cannot be used."""
    return run_command(export, Options, str(__doc__), arguments)


def export(options: Options) -> int:
    """Exports a checkpoint.

    Raises:
      ConfigError: a flag or the run cannot be used.
      TransientError: the Hub or the bucket cannot be reached.
    """
    if (is_bucket(options.run) and not options.to) or is_bucket(options.to):
        raise ConfigError(
            f"--run={options.run} and --to={options.to} do not say which folder of this host to write. It must be a "
            "local one; only the run may be in a bucket. Set --to."
        )
    run, to = Path(fetched(options.run, checkpoints=True)), Path(options.to) if options.to else None
    if not options.run or not run.is_dir():
        raise ConfigError(f"--run={options.run} is no folder. It must be the folder of a run. Set --run.")
    if options.gguf and options.dtype != "auto":
        raise ConfigError(
            f"--dtype={options.dtype} has no use with --gguf={options.gguf}, which says what matrices are kept in. "
            "Take one of the two out."
        )
    keep_compiled()
    use_most_gpu_memory()
    if options.gguf:
        folder = _export_gguf(run, to, options)
    else:
        exported = export_checkpoint(
            run, to, step=options.step, dtype=options.dtype, merge=options.merge, strict=options.strict
        )
        print(describe(exported))
        folder = exported.folder
    if options.push:
        print(f"uploaded to {push_folder(folder, options.push)}")
    return FINISHED


def _export_gguf(run: Path, to: Path | None, options: Options) -> Path:
    kind = options.gguf
    with scratch_folder() as scratch:
        exported = export_checkpoint(
            run, Path(scratch) / "model", step=options.step, dtype="float32", merge=True, strict=options.strict
        )
        folder = to or run / "exports" / f"{exported.step}-gguf"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{run.resolve().name}-{exported.step}-{kind}.gguf"
        write_gguf(file, exported.folder, kind, name=run.resolve().name)
    print(f"step {exported.step} is in {file}, matrices in {kind}")
    return folder


def describe(exported: Exported) -> str:
    """One line on what was exported."""
    if exported.is_adapter:
        return f"the adapters of step {exported.step} are in {exported.folder}; --merge exports a whole model"
    lost = exported.rounding.largest if exported.rounding else 0
    rounding = f"; rounding changes a weight by up to {lost:.2g} of its value" if lost else ""
    return f"step {exported.step} is in {exported.folder}, in {exported.dtype}{rounding}"


if __name__ == "__main__":
    sys.exit(main())
