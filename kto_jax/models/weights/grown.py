"""Weights with more rows of the vocabulary than their file has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kto_jax.models.weights.safetensors_files import Weights


class GrownWeights:
    """Weights whose embedding and output head have more rows; new rows are the mean of the others.

    Attributes:
      shapes: shape of every tensor by name.
    """

    def __init__(self, weights: Weights, names: Sequence[str], vocab_size: int) -> None:
        """Adds rows.

        Args:
          weights: the weights.
          names: of embedding and output head.
          vocab_size: number of rows that they get.
        """
        self._weights = weights
        self._own = {name: weights.shapes[name][0] for name in names if name in weights.shapes}
        grown = {name: (vocab_size, *weights.shapes[name][1:]) for name in self._own}
        self.shapes = {**weights.shapes, **grown}
        self._means: dict[str, np.ndarray] = {}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor."""
        own = self._own.get(name)
        if own is None:
            return self._weights.read(name, index)
        start, stop, _ = index[0].indices(self.shapes[name][0])
        if stop <= own:
            return self._weights.read(name, index)
        mean = self._mean(name)[index[1:]]
        added = np.broadcast_to(mean, (stop - max(start, own), *mean.shape))
        if start >= own:
            return added
        return np.concatenate([self._weights.read(name, (slice(start, own), *index[1:])), added])

    def _mean(self, name: str) -> np.ndarray:
        if name not in self._means:
            whole = self._weights.read(name, (slice(0, self._own[name]), slice(None)))
            self._means[name] = np.asarray(np.mean(whole, axis=0, dtype=np.float64))
        return self._means[name]
