"""Visits: how often an epoch uses the sequences of each source of a mixture.

A weight of 0.5 visits half of a source's sequences in each epoch, a weight of 2 visits each sequence twice. Nothing is
sampled and there is no state: the epochs together cycle through a source's sequences, and each takes the next part.

    sequences of a source   a b c d e, in seeded order d a e c b; weight 0.5, which is 3 visits
    epochs                  d a e | c b d | a e c | b d a | …       after 5 epochs each sequence was visited 3 times
"""

from __future__ import annotations

import hashlib

import numpy as np

from kto_jax.data.permutation import permute


class Visits:
    """The sequences that an epoch visits, as a function of position and epoch.

    Args:
      sequences: sequence ids.
      sources: the source of each sequence of the index; used only if a weight is not 1.
      weights: weight of each source, above 0; None visits each sequence once. A source gets its number of sequences
        times its weight in visits, rounded, and at least one [sources].
      seed: selects the order of each source's cycle.
    """

    def __init__(self, sequences: np.ndarray, sources: np.ndarray, weights: np.ndarray | None, *, seed: int):
        self._sequences, self._seed = sequences, seed
        self._sizes = self._counts = np.array([len(sequences)], np.int64)
        self.is_weighted = weights is not None and bool(np.any(weights != 1))
        if weights is not None and self.is_weighted:
            own = np.asarray(sources[sequences])
            # The sequences of a split are already ordered by source.
            if np.any(own[1:] < own[:-1]):
                self._sequences = sequences[np.argsort(own, kind="stable")]
            self._sizes = np.bincount(own, minlength=len(weights))
            whole = np.floor(self._sizes * weights + 0.5).astype(np.int64)
            self._counts = np.where(self._sizes > 0, np.maximum(whole, 1), 0)
        self._ends, self._starts = np.cumsum(self._counts), np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        """Number of visits per epoch."""
        return int(self._ends[-1])

    def at(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """The sequences at some positions of an epoch.

        Within an epoch, and over any number of epochs from the first, the visits to two sequences of one source differ
        by at most one.

        Args:
          positions: integers from 0 to len(self) - 1.
          epoch: from 0.

        Returns:
          Sequence ids, of the shape of `positions`.
        """
        if not self.is_weighted:
            return self._sequences[positions]
        group = np.searchsorted(self._ends, positions, side="right")
        sizes, counts = self._sizes[group], self._counts[group]
        within = (epoch * counts + positions - (self._ends[group] - counts)) % sizes
        for number in np.unique(group[counts % sizes != 0]).tolist():
            members = group == number
            within[members] = permute(within[members], int(self._sizes[number]), (self._seed, 0, number))
        return self._sequences[self._starts[group] + within]

    def digest(self) -> bytes:
        """Digest of all that determines the visits of every epoch."""
        parts = (self._sequences, self._sizes, self._counts, np.array([self._seed]))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()

    def total(self, values: np.ndarray) -> float:
        """Sum of a value over the visits of an epoch, averaged over epochs.

        Args:
          values: by sequence id.
        """
        rates = self._counts / np.maximum(self._sizes, 1)
        return float(np.sum(np.repeat(rates, self._sizes) * values[self._sequences]))
