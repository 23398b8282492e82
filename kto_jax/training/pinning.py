"""Pins each source on the Hub to one commit, on all hosts and over all parts of a resumed run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kto_jax.config import Config, ConfigError, ModelConfig, ReferenceConfig
from kto_jax.devices import processes
from kto_jax.models.weights.adapter_folder import is_adapter_folder, named_base
from kto_jax.models.weights.model_files import CONFIG_FILES
from kto_jax.storage.fetch import local_path
from kto_jax.storage.hub import pinned


def pin_sources(config: Config, workdir: Path | None = None) -> Config:
    """The run with every source on the Hub pinned to a commit: `org/name` becomes `org/name@COMMIT`.

    The first process resolves the revisions and sends them to the others. The run's config.json records the commits,
    and a resumed run keeps them. Every process must call this.

    Args:
      config: the run.
      workdir: its folder; None if there is no run.

    Raises:
      ConfigError: the Hub has no such repository or revision.
      TransientError: the Hub cannot be reached.
    """
    commits = _broadcast(lambda: _commits(config, workdir))
    data = dataclasses.replace(
        config.data, train=_replace(config.data.train, commits), eval=_replace(config.data.eval, commits)
    )
    model = dataclasses.replace(config.model, path=_replace(config.model.path, commits))
    reference = dataclasses.replace(config.reference, path=_replace(config.reference.path, commits))
    bases = _broadcast(lambda: {"model": _base(model, workdir), "reference": _base(reference, workdir)})
    commits = _broadcast(lambda: _pinned(bases.values(), workdir))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, base=_replace(bases["model"], commits)),
        reference=dataclasses.replace(reference, base=_replace(bases["reference"], commits)),
        data=data,
    )


def _broadcast(ask: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What the first process finds, on all processes."""
    found = processes.call_on_all(lambda: ask() if processes.is_first() else {})
    return dict(json.loads(processes.exchange_text(json.dumps(found))[0]))


def _base(source: ModelConfig | ReferenceConfig, workdir: Path | None) -> str:
    """The base of the adapters that a source holds: as it is set, recorded or named by them; "" of another model."""
    if source.base or not source.path:
        return source.base
    for recorded in _recorded_models(workdir) if workdir else ():
        if recorded["path"] == source.path:
            return str(recorded.get("base", ""))
    try:
        folder = local_path(source.path, hub_files=CONFIG_FILES)
    except ConfigError:  # read_inputs reports it, with all else that it reads.
        return ""
    return named_base(folder) if is_adapter_folder(folder) else ""


def _commits(config: Config, workdir: Path | None) -> dict[str, str]:
    """Each source as written in the config -> the source at its commit."""
    data = [name for name in (*_paths(config.data.train), *_paths(config.data.eval)) if name.startswith("hub:")]
    return _pinned((config.model.path, config.reference.path, *data), workdir)


def _pinned(sources: Iterable[str], workdir: Path | None) -> dict[str, str]:
    recorded = tuple(_recorded_sources(workdir)) if workdir else ()
    found = {}
    for source in sources:
        before = [name for name in recorded if source in (name, name.rpartition("@")[0] or name)]
        found[source] = before[0] if before else pinned(source)
    return found


def _recorded_models(workdir: Path) -> list[dict[str, Any]]:
    """The sections of policy and reference in the config.json of a run; none if there is no run."""
    try:
        values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        return [values["model"], values["reference"]]
    except (OSError, ValueError, KeyError, TypeError):  # check_folder reports a config.json that is broken
        return []


def _recorded_sources(workdir: Path) -> Iterator[str]:
    """The sources in the config.json of a run; none if there is no run."""
    try:
        values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        yield from (values["model"]["path"], values["reference"]["path"])
        yield from (values[name].get("base", "") for name in ("model", "reference"))
        yield from (*_paths(values["data"]["train"]), *_paths(values["data"]["eval"]))
    except (OSError, ValueError, KeyError, TypeError):  # check_folder reports a broken config.json
        return


def _paths(entries: Any) -> Iterator[str]:
    """The sources of `data.train` or `data.eval`."""
    for entry in [entries] if isinstance(entries, str) else entries:
        yield entry if isinstance(entry, str) else entry["source"]


def _replace(entries: Any, commits: Mapping[str, str]) -> Any:
    """A source, or the entries of `data.train`, at their commits."""
    if isinstance(entries, str):
        return commits.get(entries, entries)
    if isinstance(entries, Mapping):
        return {**entries, "source": _replace(entries["source"], commits)}
    return tuple(_replace(entry, commits) for entry in entries)
