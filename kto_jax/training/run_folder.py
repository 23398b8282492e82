"""The folder of a run: locks it, and checks that a resumed run is the same run.

config.json      the resolved configuration     metrics.jsonl   one row per step
manifest.json    the data's manifest            checkpoints/    Orbax
model.json       the architecture               policy/         the result, in Hugging Face format
tokenizer/       the tokenizer                  report.html     curves, samples, verdicts
SHA256SUMS       digests of config.json, manifest.json, model.json and the tokenizer's files
config_history.jsonl   the configuration of each part of a resumed run, and the step after which it started
adapter/         low-rank adapters in peft's format, if they were trained
tensorboard/, wandb/, wandb.json, mlflow.json   files of experiment trackers
heartbeat.json   time of the last sign of life, the last step, and what the run does
profile/         traces of JAX's profiler, if config.profile enables them
samples_before.json, samples_after.json, verdicts.json   completions of held-out prompts, and what the judges say
reference_error.json   the error of log-probabilities and rewards, if the reference is rounded
reference.json   digest of the reference's weights, if its log-probabilities are precomputed
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kto_jax.config import Config, ConfigError, TransientError, to_dict
from kto_jax.data.index.index import Index
from kto_jax.data.tokens.tokenizer import TokenizerInfo
from kto_jax.devices import processes
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.storage.atomic import write_json, write_text
from kto_jax.storage.locks import lock_file
from kto_jax.storage.run_place import ORIGIN, RunPlace
from kto_jax.storage.sums import write_sums
from kto_jax.training.resume import LEGACY_DEFAULTS

# Fields that may differ when a run is resumed: they change when results are shown, stored or computed, but not the
# results; or the index records their effect, as for the EOS.
_MAY_DIFFER = (
    "max_bad_steps",
    "row_length",
    "microbatch_rows",
    "completion_share",
    "model.remat",
    "model.keep_logits",
    "model.attention",
    "data.num_workers",
    "data.num_loaders",
    "data.index_store",
    "data.max_rejected",
    "data.layout",
    "data.unlabelled",
    "data.eos_token",
    "data.chat_template_kwargs",
    "data.template_date",
    "data.fold_system",
    "data.assistant_tokens",
    "mesh",
    "processes",
    "reference.max_error",
    "evaluation",
    "checkpoint",
    "export",
    "profile",
    "watch",
    "trackers",
    "samples.judges",
)

_HISTORY = "config_history.jsonl"
# Entries of a manifest that must be equal: the digest of the feedback's tokens, labels, weights and splits. Not the
# index's key, which changes when a new version adds a setting.
_DIGESTS = ("content_sha256",)
# Files that a start may leave if it is killed before it writes config.json.
_FIRST_FILES = {
    ".lock",
    "tokenizer",
    "manifest.json",
    ".manifest.json.partial",
    "model.json",
    ".model.json.partial",
    ".config.json.partial",
    ORIGIN,
}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder, locked by this process.

    Attributes:
      path: the folder.
      tokenizer: the run's own copy of the tokenizer.
      lock: held by the first process as long as it runs; the operating system releases it when the process is killed.
        A run in a bucket has a lease as well.
    """

    path: Path
    tokenizer: TokenizerInfo
    lock: IO[str]


def open_run(
    place: RunPlace, config: Config, index: Index, tokenizer: TokenizerInfo, architecture: TransformerConfig
) -> RunFolder:
    """Creates the folder of a run, or opens it to resume; the first process does so, the others wait for it.

    Raises:
      ConfigError: the folder cannot be written to, or it holds something else: a run with another configuration or
        other data, or no run. Nothing in it is changed then.
      TransientError: another process uses it, or this process does not see what the first one made.
    """

    def open_as_first() -> RunFolder | None:
        if not processes.is_first():
            return None
        run = _open(place.path, config, index, tokenizer, architecture)
        place.push()
        return run

    own = processes.call_on_all(open_as_first)
    return processes.call_on_all(lambda: own or _wait_for_folder(place, tokenizer, config.processes.timeout_seconds))


def _open(
    path: Path, config: Config, index: Index, tokenizer: TokenizerInfo, architecture: TransformerConfig
) -> RunFolder:
    check_folder(path, config, index, architecture)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"--workdir={path} cannot be written to: {error}. A run needs a folder of its own. Choose another one."
        ) from None
    try:
        return _lock_and_write(path, lock, config, index, tokenizer, architecture)
    except (ConfigError, TransientError):
        lock.close()
        raise


def _wait_for_folder(place: RunPlace, tokenizer: TokenizerInfo, timeout: float) -> RunFolder:
    """The folder that the first process opened, on the other processes.

    A shared file system may show a new file late, so this waits for it until the timeout, in seconds.

    Raises:
      TransientError: the folder is not visible to this process.
    """
    place.pull()
    path, deadline = place.path, time.monotonic() + timeout
    while not (path / "config.json").exists():
        if time.monotonic() > deadline:
            raise TransientError(
                f"--workdir={path} was made by the first process, and this process has not seen it for {timeout:g} s. "
                "A run of several processes needs a folder that all of them share. If they share this one, start "
                "again; otherwise choose another --workdir."
            )
        time.sleep(0.2)
    return RunFolder(path, dataclasses.replace(tokenizer, directory=path / "tokenizer"), open(os.devnull))


def _lock_and_write(
    path: Path,
    lock: IO[str],
    config: Config,
    index: Index,
    tokenizer: TokenizerInfo,
    architecture: TransformerConfig,
) -> RunFolder:
    """Locks the folder for this process, and writes a run's first files."""
    try:
        lock_file(lock, wait=False, without=f"Make sure that no other run writes to --workdir={path}.")
    except BlockingIOError:
        lock.seek(0)
        raise TransientError(
            f"--workdir={path} is in use by process {lock.read().strip() or 'unknown'}. One run may write to a folder. "
            "Wait for it to end, or choose another --workdir."
        ) from None
    check_folder(path, config, index, architecture)  # again: now no other process can write to it
    copy = dataclasses.replace(tokenizer, directory=path / "tokenizer")
    if not (path / "config.json").exists():
        shutil.rmtree(copy.directory, ignore_errors=True)
        shutil.copytree(tokenizer.directory, copy.directory)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    _begin_history(path)
    write_json(path / "manifest.json", index.manifest)
    write_json(path / "model.json", write_config_json(architecture))
    write_json(path / "config.json", to_dict(config))  # last: with it the folder is a run
    tokenizer_files = (f"tokenizer/{file.name}" for file in copy.directory.iterdir())
    write_sums(path, ("config.json", "manifest.json", "model.json", *tokenizer_files))
    return RunFolder(path, copy, lock)


def _begin_history(path: Path) -> None:
    """Records the configuration of a run's first part, if the run predates the history."""
    history, config = path / _HISTORY, path / "config.json"
    if config.exists() and not history.exists():
        write_text(history, _history_line(0, json.loads(config.read_text(encoding="utf-8"))))


def record_part(folder: Path, first_step: int, config: Config) -> None:
    """Appends the configuration for the rows of metrics.jsonl beyond `first_step` to the history.

    Entries of a killed part for these rows are dropped, as the rows are.
    """
    history = folder / _HISTORY
    kept = [line + "\n" for line, first in _read_history(history) if first < first_step]
    write_text(history, "".join(kept) + _history_line(first_step, to_dict(config)))


def check_history(folder: Path) -> str:
    """Describes the history of a run.

    Raises:
      ConfigError: it is damaged.
    """
    return f"{len(_read_history(folder / _HISTORY))} parts"


def _read_history(history: Path) -> list[tuple[str, int]]:
    """Each line of the history, and the step that its part started after."""
    try:
        lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
        return [(line, int(json.loads(line)["first_step"])) for line in lines]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{history} is damaged: {error}. Each line must be a JSON object with first_step and config. Restore the "
            "file, or remove it: it is a record that no step depends on."
        ) from None


def _history_line(first_step: int, config: Mapping[str, Any]) -> str:
    return json.dumps({"first_step": first_step, "config": config}) + "\n"


def check_folder(path: Path, config: Config, index: Index, architecture: TransformerConfig) -> None:
    """Refuses a folder that holds anything but this run or its first files; writes nothing.

    Raises:
      ConfigError: it holds other files, or a different run; lists the differences, old and new.
    """
    if not (path / "config.json").exists():
        if path.is_dir() and not set(os.listdir(path)) <= _FIRST_FILES:
            raise ConfigError(
                f"--workdir={path} holds files but no run. A run needs a new folder, an empty one or its own. Choose "
                "another --workdir."
            )
        return
    try:
        config_before, model_before, manifest_before = (
            _read_object(path / f"{name}.json") for name in ("config", "model", "manifest")
        )
        model_before = write_config_json(read_config_json(model_before)) | model_before
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--workdir={path} has a config.json, but is not a run that can be resumed: {error}. Choose another one."
        ) from None
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("config", _with_defaults(config_before, _as_json(LEGACY_DEFAULTS)), _as_json(config)),
        ("model", model_before, write_config_json(architecture)),
        (
            "data",
            {name: manifest_before.get(name) for name in _DIGESTS},
            {n: index.manifest[n] for n in _DIGESTS},
        ),
    ]
    changes = {
        f"{kind}.{name}": f"{kind}.{name}: was {before!r}, is {after!r}"
        for kind, old, new in pairs
        for name, before, after in _differences(old, new)
        if kind != "config" or not any(name == free or name.startswith(free + ".") for free in _MAY_DIFFER)
    }
    if changes and not _only_extends(path, config, config_before, changes):
        raise ConfigError(
            f"--workdir={path} holds another run ({'; '.join(changes.values())}). A run must be resumed with the same "
            "settings. Restore these, or choose another --workdir."
        )


def _read_object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold an object, not a {type(values).__name__}")
    return values


def _only_extends(path: Path, config: Config, before: Mapping[str, Any], changes: Mapping[str, str]) -> bool:
    """Whether a run differs in its length alone, and is longer.

    Raises:
      ConfigError: it does, but its learning rate depends on its length.
    """
    epochs, most = before.get("epochs", 1), before.get("max_steps", 0)
    if not (isinstance(epochs, int) and isinstance(most, int)):  # damaged
        return False
    is_longer = config.epochs >= epochs and (config.max_steps == 0 or 0 < most <= config.max_steps)
    if not is_longer or not changes.keys() <= {"config.epochs", "config.max_steps"}:
        return False
    if config.optimizer.schedule != "constant":
        raise ConfigError(
            f"--workdir={path} holds a run whose learning rate falls until its last step (config.optimizer.schedule="
            f"{config.optimizer.schedule!r}), so it cannot be made longer ({'; '.join(changes.values())}). A run is "
            'lengthened if its schedule is "constant", with or without warm-up. Restore the length, or start another '
            f"run from this one's policy with config.model.path={path}/policy and a --workdir of its own."
        )
    return True


def _as_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(config)))


def _with_defaults(recorded: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values, with defaults for fields that did not exist yet; the defaults keep the old behaviour."""
    return {**defaults, **recorded} | {
        name: _with_defaults(recorded[name], default)
        for name, default in defaults.items()
        # An empty mapping is a value, not a section.
        if default and isinstance(default, Mapping) and isinstance(recorded.get(name), Mapping)
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after
