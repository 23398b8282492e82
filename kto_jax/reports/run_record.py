"""What a run left in its folder, read without its model or its feedback."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.storage.run_place import fetched
from kto_jax.training.logs import read_metrics


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run's files.

    Attributes:
      name: of its folder, made distinct among the runs that are read together.
      config: its configuration, nested.
      metrics: rows of metrics.jsonl; the rows of one step are merged.
      verdicts: of its judges; empty if it has none, or an earlier version wrote it.
      samples: prompt -> completion after training; empty without samples.
      contests: of its evaluation (kto_jax.evaluate), if there is one.
    """

    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    verdicts: Sequence[Mapping[str, Any]]
    samples: Mapping[str, str]
    contests: Sequence[Mapping[str, Any]]

    def last(self, metric: str) -> float | None:
        """The last known value of a metric."""
        found = [row[metric] for row in self.metrics if isinstance(row.get(metric), int | float)]
        return float(found[-1]) if found else None

    def total(self, metric: str) -> float:
        """The sum of a metric over all steps."""
        return float(sum(row[metric] for row in self.metrics if isinstance(row.get(metric), int | float)))


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """Reads several runs.

    Args:
      paths: their folders, also in buckets.

    Raises:
      ConfigError: one is no run, or one of its files cannot be read.
    """
    return [_read(path, name) for path, name in zip(paths, _distinct(paths), strict=True)]


def _distinct(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [Path(path.rstrip("/")).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{', '.join(paths)} names a run twice. Each run is compared once. Take one out.")


def _read(path: str, name: str) -> RunRecord:
    folder = Path(fetched(path))
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path} is not the folder of a run: it has no config.json. Runs of kto_jax.train are compared; the rounds "
            "of an online run are in RUN/round_NNN/run. Correct the path."
        )
    return RunRecord(
        name=name,
        config=config,
        metrics=_merged(read_metrics(folder / "metrics.jsonl")),
        verdicts=_json(folder / "verdicts.json") or (),
        samples=_samples(_json(folder / "samples_after.json") or {}),
        contests=(_json(folder / "evaluation" / "evaluation.json") or {}).get("contests", ()),
    )


def _json(path: Path) -> Any:
    """The content of a JSON file; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. It must be as the run wrote it. Restore it.") from error


def _samples(values: Mapping[str, Any]) -> dict[str, str]:
    prompts, completions = values.get("prompts", ()), values.get("completions", ())
    return {json.dumps(prompt): text for prompt, text in zip(prompts, completions, strict=True)}


def _merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]
