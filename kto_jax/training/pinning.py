"""Pins each source on the Hub to one commit, on all hosts and over all parts of a resumed run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import Config, ConfigError, ModelConfig, ReferenceConfig
from kto_jax.devices import processes
from kto_jax.models.weights.adapter_folder import is_adapter_folder, named_base
from kto_jax.models.weights.model_files import CONFIG_FILES
from kto_jax.storage.fetch import local_path
from kto_jax.storage.hub import parse, pinned


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
    recorded = _read_recorded(workdir)
    commits = _broadcast(lambda: _commits(config, recorded))
    data = dataclasses.replace(
        config.data, train=_replace(config.data.train, commits), eval=_replace(config.data.eval, commits)
    )
    model = dataclasses.replace(config.model, path=_replace(config.model.path, commits))
    reference = dataclasses.replace(config.reference, path=_replace(config.reference.path, commits))
    bases = _broadcast(lambda: {"model": _base(model, recorded), "reference": _base(reference, recorded)})
    commits = _broadcast(lambda: _pinned(bases.values(), recorded.bases))
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


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """What the config.json of a run says of its sources; nothing if there is no run.

    Attributes:
      sources: of the policy, the reference and the feedback, in the order of `_commits`.
      bases: of the policy's and the reference's adapters.
      models: the sections of the policy and the reference.
    """

    sources: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    models: tuple[Mapping[str, Any], ...] = ()


def _read_recorded(workdir: Path | None) -> _Recorded:
    if workdir is None:
        return _Recorded()
    try:
        values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        models = (values["model"], values["reference"])
        data = (*_paths(values["data"]["train"]), *_paths(values["data"]["eval"]))
        sources = (*(model["path"] for model in models), *(name for name in data if name.startswith("hub:")))
        return _Recorded(sources, tuple(model.get("base", "") for model in models), models)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # reported by check_folder
        return _Recorded()


def _base(source: ModelConfig | ReferenceConfig, recorded: _Recorded) -> str:
    """The base of the adapters that a source holds: as it is set, recorded or named by them; "" of another model."""
    if source.base or not source.path:
        return source.base
    for model in recorded.models:
        if model["path"] == source.path:
            return str(model.get("base", ""))
    try:
        folder = local_path(source.path, hub_files=CONFIG_FILES)
    except ConfigError:  # read_inputs reports it, with all else that it reads.
        return ""
    return named_base(folder) if is_adapter_folder(folder) else ""


def _commits(config: Config, recorded: _Recorded) -> dict[str, str]:
    """Each source as written in the config -> the source at its commit."""
    data = [name for name in (*_paths(config.data.train), *_paths(config.data.eval)) if name.startswith("hub:")]
    return _pinned((config.model.path, config.reference.path, *data), recorded.sources)


def _pinned(sources: Iterable[str], recorded: Sequence[str]) -> dict[str, str]:
    """Each source -> the source at its commit: the recorded one if there is one, whatever its branch is at now.

    One repository may be there at several revisions, so the second mention of it is the second that was recorded.
    """
    left: dict[str, list[str]] = {}
    for name in recorded:
        left.setdefault(_without_revision(name), []).append(name)
    found: dict[str, str] = {}
    for source in sources:
        before = left.get(_without_revision(source), [])
        kept = before.pop(0) if before else None
        parsed = parse(source)
        if kept is None or (parsed is not None and parsed.is_pinned):
            kept = pinned(source)
        elif parsed is not None and parsed.revision:
            print(f"{source}: the run keeps the commit with which it began, {kept}", file=sys.stderr)
        found.setdefault(source, kept)
    return found


def _without_revision(source: str) -> str:
    parsed = parse(source)
    return source if parsed is None else parsed.at("")


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
