"""Pins each source on the Hub to one commit, on all hosts and over all parts of a resumed run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kto_jax.config import Config
from kto_jax.devices import processes
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
    commits = processes.together(lambda: _commits(config, workdir) if processes.is_first() else {})
    commits = json.loads(processes.tell(json.dumps(commits))[0])
    data = dataclasses.replace(
        config.data, train=_replace(config.data.train, commits), eval=_replace(config.data.eval, commits)
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=_replace(config.model.path, commits)),
        reference=dataclasses.replace(config.reference, path=_replace(config.reference.path, commits)),
        data=data,
    )


def _commits(config: Config, workdir: Path | None) -> dict[str, str]:
    """Each source as written in the config -> the source at its commit."""
    recorded = set(_recorded(workdir)) if workdir else set()
    models = (config.model.path, config.reference.path)
    data = [name for name in (*_names(config.data.train), *_names(config.data.eval)) if name.startswith("hub:")]
    found = {}
    for source in (*models, *data):
        before = [name for name in recorded if source in (name, name.rpartition("@")[0] or name)]
        found[source] = before[0] if before else pinned(source)
    return found


def _recorded(workdir: Path) -> Iterator[str]:
    """The sources in the config.json of a run; none if there is no run."""
    try:
        values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        yield from (values["model"]["path"], values["reference"]["path"])
        yield from (*_names(values["data"]["train"]), *_names(values["data"]["eval"]))
    except (OSError, ValueError, KeyError, TypeError):  # check_folder reports a broken config.json
        return


def _names(entries: Any) -> Iterator[str]:
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
