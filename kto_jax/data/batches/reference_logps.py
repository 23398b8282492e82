"""A store of precomputed log-probabilities under a frozen reference, so that training keeps no reference in memory.

    STORE/matched.npy      float32 [rows of the index], each row's own completion after its prompt
    STORE/unmatched.npy    float32 [steps, sequences of a step], each prompt with its unrelated completion; 0 if there
                           is none. They are stored by step, because partners change every epoch.

NaN marks entries that are not written yet. The contents depend only on the store's key, so an interrupted store is
resumed, and processes that fill the same store concurrently write the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.storage.atomic import new_file


@dataclasses.dataclass(frozen=True)
class ReferenceLogps:
    """An opened store; its arrays are memory-mapped files.

    Attributes:
      directory: the store's folder.
      matched: by row of the index, in nats.
      unmatched: by step and position in the step's sequences, in nats.
    """

    directory: Path
    matched: np.ndarray
    unmatched: np.ndarray

    def __reduce__(self) -> tuple:
        # Pickling transfers the path, not the arrays.
        return open_store, (self.directory, *self.matched.shape, *self.unmatched.shape)

    def is_missing(self, num_steps: int) -> np.ndarray:
        """Whether each step below `num_steps` is not written yet [num_steps], bool."""
        return np.isnan(self.unmatched[:num_steps]).any(axis=1)

    def write(self, step: int, rows: np.ndarray, matched: np.ndarray, unmatched: np.ndarray) -> None:
        """Writes the log-probabilities of a step.

        Args:
          step: from 0.
          rows: row of the index of each sequence.
          matched: of each sequence; empty if all are already written.
          unmatched: of each sequence; 0 if its prompt has no partner.
        """
        if len(matched):
            self.matched[rows] = matched
            # A step counts as written when its unmatched numbers are, so the matched ones are flushed first.
            self.matched.flush()  # type: ignore[attr-defined]
        self.unmatched[step, len(rows) :] = 0
        self.unmatched[step, : len(rows)] = unmatched


def open_store(directory: Path, num_rows: int, num_steps: int, num_sequences: int) -> ReferenceLogps:
    """Opens a store, or creates it.

    Args:
      directory: its folder, named by its key.
      num_rows: rows of the index.
      num_steps: steps of the schedule.
      num_sequences: maximum number of sequences of a step.

    Raises:
      ConfigError: the folder does not hold a store of these sizes.
    """
    arrays = {}
    for name, shape in (("matched", (num_rows,)), ("unmatched", (num_steps, num_sequences))):
        path = directory / f"{name}.npy"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _begin(path, shape)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error}. The reference's log-probabilities need "
                f"{4 * math.prod(shape):,} bytes in the cache. Make room, or set KTO_JAX_CACHE to another folder."
            ) from None
        try:
            arrays[name] = np.load(path, mmap_mode="r+", allow_pickle=False)
            whole = arrays[name].shape == shape
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise ConfigError(
                f"{path} is not an array of {shape} reference log-probabilities, which config.reference.precompute "
                "needs. Delete the folder to compute them again."
            )
    return ReferenceLogps(directory, **arrays)


def _begin(path: Path, shape: tuple[int, ...]) -> None:
    """Creates an array of NaN; if two processes do so concurrently, one file stays."""
    with new_file(path, shared=True, replace=False) as partial, partial.open("wb") as file:
        np.save(file, np.full(shape, np.nan, np.float32), allow_pickle=False)
