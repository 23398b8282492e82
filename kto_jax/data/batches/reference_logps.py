"""A store of precomputed log-probabilities under a frozen reference, so that training keeps no reference in memory.

    STORE/matched.npy      [rows of the index], each row's own completion after its prompt
    STORE/unmatched.npy    [steps, sequences of a step], each prompt with its unrelated completion; 0 if there is none.
                           They are stored by step, because partners change every epoch.

Each number is stored as 64 bits: those of its float32, and above them their complement. So a changed bit is found when
a store is opened; the store is then begun anew. Both halves are written at once, so a killed process leaves whole ones.

NaN marks entries that are not written yet. The contents depend only on the store's key, so an interrupted store is
resumed, and processes that fill the same store concurrently write the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.storage.atomic import new_file
from kto_jax.storage.locks import lock_file


@dataclasses.dataclass(frozen=True)
class ReferenceLogps:
    """An opened store; its arrays are memory-mapped files.

    Attributes:
      directory: the store's folder.
      matched_bits: uint64, by row of the index.
      unmatched_bits: uint64, by step and position in the step's sequences.
    """

    directory: Path
    matched_bits: np.ndarray
    unmatched_bits: np.ndarray

    def __reduce__(self) -> tuple:
        # Pickling transfers the path, not the arrays.
        return _reopen, (self.directory,)

    @property
    def matched(self) -> np.ndarray:
        """By row of the index, in nats, float32; NaN if not written yet."""
        return _numbers(self.matched_bits)

    @property
    def unmatched(self) -> np.ndarray:
        """By step and position in the step's sequences, in nats, float32; NaN if not written yet."""
        return _numbers(self.unmatched_bits)

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
            self.matched_bits[rows] = _bits(matched)
            # A step counts as written when its unmatched numbers are, so the matched ones are flushed first.
            self.matched_bits.flush()  # type: ignore[attr-defined]
        self.unmatched_bits[step, len(rows) :] = _bits(np.zeros(1))
        self.unmatched_bits[step, : len(rows)] = _bits(unmatched)


def open_store(directory: Path, num_rows: int, num_steps: int, num_sequences: int) -> ReferenceLogps:
    """Opens a store, or creates it; one that is damaged is reported and begun anew.

    Args:
      directory: its folder, named by its key.
      num_rows: rows of the index.
      num_steps: steps of the schedule.
      num_sequences: maximum number of sequences of a step.

    Raises:
      ConfigError: the folder cannot be written to.
    """
    shapes = {"matched": (num_rows,), "unmatched": (num_steps, num_sequences)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("a") as lock:
            # Two processes must not both replace a damaged store.
            lock_file(lock, wait=True, without="Start one run with the same reference and feedback at a time.")
            _make_whole(directory, shapes)
    except OSError as error:
        size = sum(8 * math.prod(shape) for shape in shapes.values())
        raise ConfigError(
            f"{directory} cannot be written: {error}. The reference's log-probabilities need {size:,} bytes in the "
            "cache. Make room, or set KTO_JAX_CACHE to another folder."
        ) from None
    return _reopen(directory)


def damage_of(directory: Path) -> str:
    """What is wrong with the numbers of a store, or "" if nothing is; reads all of them."""
    for name in ("matched", "unmatched"):
        path = directory / f"{name}.npy"
        found = _load(path)
        if found is None or found.dtype != np.uint64:
            return f"{path} holds no such numbers"
        halves = found.view(np.uint32)
        if wrong := int(np.count_nonzero(halves[..., 0::2] != ~halves[..., 1::2])):
            return f"{wrong} of the {found.size} numbers in {path} have changed since they were written"
    return ""


def _make_whole(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Creates the arrays that a store lacks, and replaces those of a damaged store."""
    paths = {name: directory / f"{name}.npy" for name in shapes}
    found = {name: _load(path) for name, path in paths.items() if path.exists()}
    for name, array in found.items():
        if array is not None and array.dtype == np.float32 and array.shape == shapes[name]:
            print(f"{paths[name]} was written without complements, so its numbers are unchecked", file=sys.stderr)
            _begin(paths[name], array)
            found[name] = _load(paths[name])
    for name in shapes.keys() - found.keys():
        _begin(paths[name], np.full(shapes[name], np.nan, np.float32))
    wrong = [paths[name] for name, array in found.items() if array is None or array.shape != shapes[name]]
    damage = f"{wrong[0]} is not an array of {shapes[wrong[0].stem]} numbers" if wrong else damage_of(directory)
    if damage:
        print(f"warning: {damage}. All reference log-probabilities are computed again.", file=sys.stderr)
        for name, shape in shapes.items():
            _begin(paths[name], np.full(shape, np.nan, np.float32))


def _begin(path: Path, numbers: np.ndarray) -> None:
    """Writes an array in a new file; a process that has an older one open keeps it."""
    with new_file(path, shared=True) as partial, partial.open("wb") as file:
        np.save(file, _bits(numbers), allow_pickle=False)


def _load(path: Path) -> np.ndarray | None:
    """A memory-mapped array; None if the file holds none."""
    try:
        return np.load(path, mmap_mode="r+", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _reopen(directory: Path) -> ReferenceLogps:
    arrays = (
        np.load(directory / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in ("matched", "unmatched")
    )
    return ReferenceLogps(directory, *arrays)


def _bits(numbers: np.ndarray) -> np.ndarray:
    """Numbers as they are stored."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return bits | ~bits.astype(np.uint64) << np.uint64(32)


def _numbers(bits: np.ndarray) -> np.ndarray:
    """The lower halves of stored numbers, as a view (little-endian)."""
    return bits.view(np.float32)[..., 0::2]
