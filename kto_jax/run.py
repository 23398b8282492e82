"""The folder of a run: who may write to it, and whether the same run is being continued.

config.json      the resolved configuration     metrics.jsonl   one row per step
manifest.json    what the data was              checkpoints/    Orbax
model.json       the architecture               policy/         the result, in Hugging Face format
tokenizer/       the tokenizer                  report.html     curves, samples, verdicts
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kto_jax.config import Config, ConfigError, to_dict
from kto_jax.data.index import Index
from kto_jax.data.tokenize import TokenizerInfo
from kto_jax.models.config import TransformerConfig

# Fields that may differ when a run is continued: they change when things are shown, kept or computed, not what.
_FREE = (
    "log_every",
    "max_bad_steps",
    "row_length",
    "microbatch_rows",
    "completion_share",
    "model.remat",
    "data.num_workers",
    "data.max_rejected",
    "mesh",
    "evaluation",
    "checkpoint",
    "samples",
)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder, held by this process.

    Attributes:
      path: the folder.
      tokenizer: the run's own copy of the tokenizer.
      lock: held while the process lives; the operating system lets go of it when the process is killed.
    """

    path: Path
    tokenizer: TokenizerInfo
    lock: IO[str]


def open_run(
    path: Path, config: Config, index: Index, tokenizer: TokenizerInfo, architecture: TransformerConfig
) -> RunFolder:
    """Creates the folder of a run, or finds it again to continue.

    Raises:
      ConfigError: another process writes to it, or it holds a run with another configuration or other data. Nothing in
        it has been changed then.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ConfigError(
            f"--workdir={path} is in use by process {lock.read().strip() or 'unknown'}. One run may write to a folder. "
            "Wait for it to end, or choose another --workdir."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    _check_same_run(path, config, index, architecture)
    copy = dataclasses.replace(tokenizer, directory=path / "tokenizer")
    if not copy.directory.exists():
        shutil.copytree(tokenizer.directory, copy.directory)
    write_json(path / "manifest.json", index.manifest)
    write_json(path / "model.json", architecture.to_hugging_face())
    write_json(path / "config.json", to_dict(config))
    return RunFolder(path, copy, lock)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file that a reader never sees half-written."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _check_same_run(path: Path, config: Config, index: Index, architecture: TransformerConfig) -> None:
    """Refuses to continue a run with something else.

    Raises:
      ConfigError: listing what differs, old and new.
    """
    if not (path / "config.json").exists():
        return
    normal = json.loads(json.dumps(to_dict(config)))
    pairs = [
        ("config", json.loads((path / "config.json").read_text()), normal),
        ("model", json.loads((path / "model.json").read_text()), architecture.to_hugging_face()),
        ("data", {"key": json.loads((path / "manifest.json").read_text())["key"]}, {"key": index.manifest["key"]}),
    ]
    changes = [
        f"{kind}.{name}: was {before!r}, is {after!r}"
        for kind, old, new in pairs
        for name, before, after in _differences(old, new)
        if kind != "config" or not any(name == free or name.startswith(free + ".") for free in _FREE)
    ]
    if changes:
        raise ConfigError(
            f"--workdir={path} holds another run ({'; '.join(changes)}). A run is continued as it was begun. "
            "Restore these, or choose another --workdir."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after
