"""Which sequence lies where in the packed rows, and the rows themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from kto_jax.shapes import PackedRows


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What a packed row has room for: L tokens, C completion tokens, S examples."""

    length: int
    completion_length: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each sequence of a list lies. Arrays [sequences], int64.

    Attributes:
      rows: packed row.
      slots: slot in its row, from 0.
      starts: its first token's position in its row.
      completion_starts: the position of its first completion token among its row's completion tokens.
      num_rows: rows in use.
    """

    rows: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    completion_starts: np.ndarray
    num_rows: int


def pack(num_prompt: np.ndarray, num_completion: np.ndarray, shape: RowShape, *, unit: int = 1) -> Packing:
    """First fit, longest first, under the three capacities of a row. A pure function of the lengths.

        unit 1    a b c d  ->  rows 0 1 0 0      each sequence goes where it fits
        unit 2    a b c d  ->  rows 0 0 1 1      a and b are in one row, in slots 2k and 2k + 1, and so are c and d

    Args:
      num_prompt: tokens of each sequence's prompt [sequences].
      num_completion: tokens of each sequence's completion [sequences].
      shape: what a row has room for.
      unit: how many consecutive sequences must lie side by side in one row; each unit fits a row by itself.

    Returns:
      The place of every sequence, in the order given.
    """
    sizes = np.stack([np.asarray(num_prompt, np.int64) + num_completion, num_completion, np.ones_like(num_completion)])
    sizes = sizes.T.astype(np.int64).reshape(-1, unit, 3)
    rows, starts, num_rows = _first_fit(
        sizes.sum(axis=1), np.array([shape.length, shape.completion_length, shape.slots])
    )
    # Inside its unit, a sequence starts where those before it end.
    tokens, completions, slots = (starts[:, None] + np.cumsum(sizes, axis=1) - sizes).reshape(-1, 3).T
    return Packing(np.repeat(rows, unit), slots, tokens, completions, num_rows)


def _first_fit(needs: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Row of each unit, what its row already held of each resource, and how many rows are in use.

    Args:
      needs: of each resource; the first decides the order [units, resources].
      capacity: what a row has of each [resources].
    """
    count = len(needs)
    used, starts, rows = np.zeros_like(needs), np.zeros_like(needs), np.zeros(count, np.int64)
    num_rows = 0
    for i in np.argsort(-needs[:, 0], kind="stable"):
        fits = np.flatnonzero((used[:num_rows] + needs[i] <= capacity).all(axis=1))
        rows[i] = row = int(fits[0]) if len(fits) else num_rows
        num_rows = max(num_rows, row + 1)
        starts[i] = used[row]
        used[row] += needs[i]
    return rows, starts, num_rows


def fill(
    packing: Packing,
    sequence: Callable[[int], tuple[np.ndarray, np.ndarray]],
    *,
    num_microbatches: int,
    microbatch_rows: int,
    rows: slice,
    shape: RowShape,
) -> PackedRows:
    """Writes the sequences of some rows of every microbatch.

    Args:
      packing: where each sequence lies; row r is row r % R of microbatch r // R.
      sequence: gives the ids of sequence i's prompt and completion; called only for the rows asked for.
      num_microbatches: M.
      microbatch_rows: R, over all hosts.
      rows: contiguous part of the R rows to write.
      shape: what a row has room for.

    Returns:
      NumPy arrays [M, rows asked for, …]; rows without sequences have segment ids 0.
    """
    first, last, _ = rows.indices(microbatch_rows)
    lead = (num_microbatches, last - first)
    tokens, segment_ids, positions = (np.zeros((*lead, shape.length), np.int32) for _ in range(3))
    predictors, targets, target_segments = (np.zeros((*lead, shape.completion_length), np.int32) for _ in range(3))
    filled = np.zeros((*lead, shape.slots), bool)
    microbatch, row = np.divmod(packing.rows, microbatch_rows)
    for i in np.flatnonzero((row >= first) & (row < last)):
        prompt, completion = sequence(int(i))
        at = (microbatch[i], row[i] - first)
        start, split, slot = packing.starts[i], len(prompt), packing.slots[i]
        end = start + split + len(completion)
        tokens[at][start : start + split] = prompt
        tokens[at][start + split : end] = completion
        segment_ids[at][start:end] = slot + 1
        positions[at][start:end] = np.arange(end - start)
        here = slice(packing.completion_starts[i], packing.completion_starts[i] + len(completion))
        predictors[at][here] = np.arange(start + split - 1, end - 1)
        targets[at][here] = completion
        target_segments[at][here] = slot + 1
        filled[at][slot] = True
    return PackedRows(tokens, segment_ids, positions, predictors, targets, target_segments, filled)
