"""Log-probabilities under a frozen reference, kept beside the index: training then holds no reference.

    STORE/matched.npy      float32 [rows of the index], of each row's own completion behind its prompt
    STORE/unmatched.npy    float32 [steps, sequences of a step], of each prompt with its unrelated completion; 0 where
                           there is none. The prompts' partners are made in every epoch anew, so they have a step.

NaN stands where nothing is written yet. What is written is a function of the store's key alone, so a store that was
killed is gone on with, and processes that fill the same store at once write the same numbers.
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
    """An opened store; its arrays lie in files.

    Attributes:
      directory: where.
      matched: by row of the index, in nats.
      unmatched: by step and position in the step's sequences, in nats.
    """

    directory: Path
    matched: np.ndarray
    unmatched: np.ndarray

    def __reduce__(self) -> tuple:
        # To another process travels the place, not the numbers.
        return open_store, (self.directory, *self.matched.shape, *self.unmatched.shape)

    def is_missing(self, num_steps: int) -> np.ndarray:
        """Which steps below `num_steps` are not written yet [num_steps], bool."""
        return np.isnan(self.unmatched[:num_steps]).any(axis=1)

    def write(self, step: int, rows: np.ndarray, matched: np.ndarray, unmatched: np.ndarray) -> None:
        """Writes what a step reads.

        Args:
          step: from 0.
          rows: row of the index of each sequence.
          matched: of each sequence; empty where all are known already.
          unmatched: of each sequence; 0 where its prompt has no partner.
        """
        if len(matched):
            self.matched[rows] = matched
            # The step counts as written by its unmatched numbers, so these go to disk first.
            self.matched.flush()  # type: ignore[attr-defined]
        self.unmatched[step, len(rows) :] = 0
        self.unmatched[step, : len(rows)] = unmatched


def open_store(directory: Path, num_rows: int, num_steps: int, num_sequences: int) -> ReferenceLogps:
    """Opens a store, or begins one.

    Args:
      directory: its folder, named by its key.
      num_rows: rows of the index.
      num_steps: steps of the schedule.
      num_sequences: most sequences of a step.

    Raises:
      ConfigError: what lies there is no store of these sizes.
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
                f"{path} is no array of {shape} reference log-probabilities, which config.reference.precompute "
                "writes and reads. Delete the folder to have it made again."
            )
    return ReferenceLogps(directory, **arrays)


def _begin(path: Path, shape: tuple[int, ...]) -> None:
    """An array of NaN; of two processes that begin it at once, the file of one stays."""
    with new_file(path, shared=True, replace=False) as partial, partial.open("wb") as file:
        np.save(file, np.full(shape, np.nan, np.float32), allow_pickle=False)
