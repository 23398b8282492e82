"""The sources that a configuration names, each with its own weight and settings for reading.

An entry of `data.train` or `data.eval` is a source, or a mapping of the source, its weight and settings of its own:

    config.data.train = ({"source": "pairs.jsonl", "format": "pairs", "weight": 0.5}, "thumbs.jsonl")

`kto_jax.data.batches.visits` explains weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kto_jax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """An entry of `data.train` or `data.eval`.

    Attributes:
      number: position among all sources.
      path: what to read: a file, a directory, a glob, or one of the prefixed kinds.
      split: "train" or "eval".
      weight: how often an epoch visits each of its sequences.
      own: the entry's own settings.
      data: how its records are read: the settings of all sources, overridden by its own.
    """

    number: int
    path: str
    split: str
    weight: float
    own: Mapping[str, Any]
    data: DataConfig

    @property
    def scale(self) -> int | None:
        """Its number if it has its own score rule or threshold; None for sources that share a scale."""
        return None if {"score_rule", "score_threshold"}.isdisjoint(self.own) else self.number


def sources_of(data: DataConfig) -> list[Source]:
    """The sources that a configuration names, training sources first; empty entries are omitted."""
    found: list[Source] = []
    for split, entries in (("train", data.train), ("eval", data.eval)):
        for entry in [entries] if isinstance(entries, str) else entries:
            own: dict[str, Any] = {"source": entry} if isinstance(entry, str) else dict(entry)
            path, weight = own.pop("source"), own.pop("weight", 1.0)
            if path:
                found.append(Source(len(found), path, split, weight, own, dataclasses.replace(data, **own)))
    return found
