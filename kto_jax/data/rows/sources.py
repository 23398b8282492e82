"""Mixtures: sources that are read each in its own way, and how often an epoch visits the rows of each.

An entry of `data.train` or `data.eval` is a source, or a mapping of the source, its weight and settings of its own:

    config.data.train = ({"source": "pairs.jsonl", "format": "pairs", "weight": 0.5}, "thumbs.jsonl")

A weight of 0.5 visits half of a source's rows in each epoch, one of 2 each row twice. Nothing is drawn and nothing
remembered: the visits of all epochs to a source are one cycle through its rows, of which an epoch takes the next part.

    rows of a source      a b c d e, in seeded order d a e c b; weight 0.5, which is 3 visits
    epochs                d a e | c b d | a e c | b d a | …       after 5 epochs each row was visited 3 times
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kto_jax.config import DataConfig
from kto_jax.data.permutation import permute


@dataclasses.dataclass(frozen=True)
class Source:
    """An entry of `data.train` or `data.eval`.

    Attributes:
      number: position among all sources.
      path: what to read: a file, a directory, a glob, or one of the prefixed kinds.
      split: "train" or "eval".
      weight: visits of an epoch to each row.
      own: the settings that the entry makes for itself.
      data: how its rows are read: the settings of all, with its own in their place.
    """

    number: int
    path: str
    split: str
    weight: float
    own: Mapping[str, Any]
    data: DataConfig

    @property
    def scale(self) -> int | None:
        """Its number where it says itself how its scores are judged; None of all sources that are judged together."""
        return None if {"score_rule", "score_threshold"}.isdisjoint(self.own) else self.number


def sources_of(data: DataConfig) -> list[Source]:
    """The sources that a configuration names, those to train on first; empty entries are left out."""
    found: list[Source] = []
    for split, entries in (("train", data.train), ("eval", data.eval)):
        for entry in [entries] if isinstance(entries, str) else entries:
            own: dict[str, Any] = {"source": entry} if isinstance(entry, str) else dict(entry)
            path, weight = own.pop("source"), own.pop("weight", 1.0)
            if path:
                found.append(Source(len(found), path, split, weight, own, dataclasses.replace(data, **own)))
    return found


def with_weights(manifest: dict[str, Any], settings: dict[str, Any], weights: list[float]) -> dict[str, Any]:
    """A manifest that says how a run weighs what was built; the index itself does not depend on it.

    Args:
      manifest: of an index.
      settings: of the run's data, as the manifest holds them.
      weights: of each of the manifest's sources.

    Returns:
      A copy, in which each source has its weight and the share of an epoch's visits that go to it, of completions and
      of pairs.
    """
    sources = []
    counts = [source.get("train", {"desirable": 0, "undesirable": 0, "pairs": 0}) for source in manifest["sources"]]
    kinds = {
        "completions": [count["desirable"] + count["undesirable"] for count in counts],
        "pairs": [count["pairs"] for count in counts],
    }
    visits = {kind: np.array(numbers) * np.array(weights) for kind, numbers in kinds.items()}
    for i, source in enumerate(manifest["sources"]):
        share = {kind: round(float(each[i] / max(each.sum(), 1e-9)), 6) for kind, each in visits.items()}
        sources.append({**source, "weight": weights[i], "share": share})
    return {**manifest, "data": settings, "sources": sources}


def weights_of(manifest: Mapping[str, Any]) -> np.ndarray:
    """How often an epoch visits each row of each source, float64 [sources]."""
    return np.array([source.get("weight", 1.0) for source in manifest.get("sources", ())])


class Visits:
    """Which rows the visits of an epoch go to; a function of position and epoch, computed position by position.

    Args:
      rows: row ids.
      sources: the source of each row, by row id; read only where a weight is not 1.
      weights: of each source, above 0; none where each row is visited once. An epoch pays each source its rows times
        its weight, rounded to whole visits, and at least one [sources].
      seed: chooses the order of each source's cycle.
    """

    def __init__(self, rows: np.ndarray, sources: np.ndarray, weights: np.ndarray | None, *, seed: int):
        self._rows, self._seed = rows, seed
        self._sizes = self._counts = np.array([len(rows)], np.int64)
        self.is_weighted = weights is not None and bool(np.any(weights != 1))
        if weights is not None and self.is_weighted:
            of_rows = np.asarray(sources[rows])
            # The rows of a split are ordered by source already.
            if np.any(of_rows[1:] < of_rows[:-1]):
                self._rows = rows[np.argsort(of_rows, kind="stable")]
            self._sizes = np.bincount(of_rows, minlength=len(weights))
            whole = np.floor(self._sizes * weights + 0.5).astype(np.int64)
            self._counts = np.where(self._sizes > 0, np.maximum(whole, 1), 0)
        self._ends, self._starts = np.cumsum(self._counts), np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        """Visits of an epoch."""
        return int(self._ends[-1])

    def at(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """The rows that visits of an epoch go to.

        Within an epoch the visits to the rows of one source differ by one at most, and so they do over any number of
        epochs from the first.

        Args:
          positions: integers from 0 to len(self) - 1.
          epoch: from 0.

        Returns:
          Row ids, of the shape of `positions`.
        """
        if not self.is_weighted:
            return self._rows[positions]
        group = np.searchsorted(self._ends, positions, side="right")
        sizes, counts = self._sizes[group], self._counts[group]
        within = (epoch * counts + positions - (self._ends[group] - counts)) % sizes
        for number in np.unique(group[counts % sizes != 0]).tolist():
            members = group == number
            within[members] = permute(within[members], int(self._sizes[number]), (self._seed, 0, number))
        return self._rows[self._starts[group] + within]

    def digest(self) -> bytes:
        """Of all that decides which rows the visits of every epoch go to."""
        parts = (self._rows, self._sizes, self._counts, np.array([self._seed]))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()

    def total(self, values: np.ndarray) -> float:
        """Sum of a value over the visits of an epoch, in the mean of all epochs.

        Args:
          values: by row id.
        """
        rates = self._counts / np.maximum(self._sizes, 1)
        return float(np.sum(np.repeat(rates, self._sizes) * values[self._rows]))
