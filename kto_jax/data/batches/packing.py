"""Packing: assigns sequences to rows, chooses row lengths, and fills the rows."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np

from kto_jax.data.permutation import permute
from kto_jax.shapes import PackedRows, power_of_two

_EIGHTHS = (8, 9, 10, 11, 12, 14, 16, 24, 32)
"""Row lengths to try, in eighths of the shortest."""
_NUM_TRIALS = 48
_MAX_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Capacity of a packed row: L tokens, C completion tokens, S sequences."""

    length: int
    completion_length: int
    slots: int


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """Limits of a run's packed rows.

    Attributes:
      lengths: tokens per packed row (L), shortest first; the training step is compiled for each.
      completion_length: capacity in completion tokens of a row of the shortest length (C).
      microbatch_rows: packed rows per microbatch, over all hosts (R).
      max_length: maximum tokens of a sequence, prompt and completion together.
    """

    lengths: tuple[int, ...]
    completion_length: int
    microbatch_rows: int
    max_length: int

    def shapes(self, slots: int) -> list[RowShape]:
        """The shape of a row of each length, with `slots` slots."""
        return [RowShape(n, round(self.completion_length * n / self.lengths[0]), slots) for n in self.lengths]


@dataclasses.dataclass(frozen=True)
class Packing:
    """The place of each sequence of a list. Arrays [sequences], int64.

    Attributes:
      rows: its packed row.
      slots: its slot in the row, from 0.
      starts: its first token's position in its row.
      completion_starts: the position of its first completion token among its row's completion tokens.
      num_rows: number of rows used.
    """

    rows: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    completion_starts: np.ndarray
    num_rows: int


def pack(num_prompt: np.ndarray, num_completion: np.ndarray, shape: RowShape, *, unit: int = 1) -> Packing:
    """Best-fit decreasing under the three capacities of a row. A pure function of the lengths.

        unit 1    a b c d  ->  rows 0 1 0 0      each sequence goes where it leaves the least room
        unit 2    a b c d  ->  rows 0 0 1 1      a and b are in one row, in slots 2k and 2k + 1, and so are c and d

    Args:
      num_prompt: tokens of each sequence's prompt [sequences].
      num_completion: tokens of each sequence's completion [sequences].
      shape: capacity of a row.
      unit: number of consecutive sequences that must be adjacent in one row; each unit must fit a row.

    Returns:
      The place of every sequence, in the given order.
    """
    sizes = np.stack([np.asarray(num_prompt, np.int64) + num_completion, num_completion, np.ones_like(num_completion)])
    sizes = sizes.T.astype(np.int64).reshape(-1, unit, 3)
    needs = sizes.sum(axis=1)
    rows = np.array(_best_fit(needs, shape), np.int64)
    starts = _starts(rows, needs)
    # Inside its unit, a sequence starts where those before it end.
    tokens, completions, slots = (starts[:, None] + np.cumsum(sizes, axis=1) - sizes).reshape(-1, 3).T
    return Packing(np.repeat(rows, unit), slots, tokens, completions, int(rows.max(initial=-1)) + 1)


def choose_row_lengths(
    num_prompt: np.ndarray,
    num_completion: np.ndarray,
    *,
    batch_size: int,
    shortest: int,
    completion_share: float = 1.0,
    microbatch_rows: int = 1,
    num_lengths: int = 1,
    unit: int = 1,
) -> tuple[int, ...]:
    """Chooses the row lengths that minimise padding in a step's microbatches, evaluated on batches of the data.

    A non-empty microbatch of R rows of L tokens costs R L tokens. With few examples per step the last microbatch is
    often half empty. Several lengths then help: each step uses the cheapest. Each length compiles the training step
    once more, so an additional length must save at least 1 %.

    Args:
      num_prompt: kept tokens of each example's prompt; for pairs, of both prompts [rows].
      num_completion: likewise for its completion [rows].
      batch_size: examples (or pairs) per step.
      shortest: minimum capacity of a row in tokens: data.max_length, or twice that for pairs.
      completion_share: capacity of a row in completion tokens, as a share of its length.
      microbatch_rows: rows per microbatch, over all devices (R).
      num_lengths: maximum number of lengths.
      unit: 2 for pairs, which take two slots.

    Returns:
      The lengths, shortest first: the first is at least `shortest`.
    """
    candidates = sorted({_round_up(shortest * eighths / 8, 128 if shortest >= 1024 else 8) for eighths in _EIGHTHS})
    totals = num_prompt + num_completion
    slots = num_slots(totals / unit, candidates[-1], batch_size * unit)
    shapes = [RowShape(length, round(length * completion_share), slots) for length in candidates]
    needs = np.stack([totals, num_completion, np.full_like(totals, unit)], axis=1)
    # Half of the batches represent matched rows, half unmatched ones; each is sampled independently.
    size = min(batch_size, len(totals))
    drawn = permute(np.arange(2 * _NUM_TRIALS * size) % len(totals), len(totals), (0,)).reshape(-1, size)
    num_rows = np.array([[max(_best_fit(needs[rows], shape)) + 1 for rows in drawn] for shape in shapes])
    microbatches = -(-num_rows // microbatch_rows)
    tokens = microbatches * microbatch_rows * np.array(candidates)[:, None]
    # Matched rows count twice, because they also have a backward pass.
    costs = 2 * tokens[:, ::2] + tokens[:, 1::2]

    def cost(chosen: tuple[int, ...]) -> float:
        return float(costs[list(chosen)].min(axis=0).mean()) * (1 + 0.01 * (len(chosen) - 1))

    numbers = range(len(candidates))
    choices = [chosen for count in range(1, num_lengths + 1) for chosen in itertools.combinations(numbers, count)]
    return tuple(candidates[number] for number in min(choices, key=cost))


def num_slots(totals: np.ndarray, row_length: int, batch_size: int) -> int:
    """Number of sequences that fit in a row (S), a power of two.

    Best fit packs the short sequences together into the last rows, so the 10th percentile of lengths decides. An empty
    slot costs almost nothing.

    Args:
      totals: tokens of each sequence [sequences].
      row_length: tokens of a row.
      batch_size: maximum number of sequences of a step.
    """
    short = max(1.0, float(np.percentile(totals, 10)))
    return min(_MAX_SLOTS, power_of_two(math.ceil(row_length / short)), power_of_two(batch_size))


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _best_fit(needs: np.ndarray, shape: RowShape) -> list[int]:
    """Row of each unit: the one with the least room for tokens that still fits it, else a new one.

    Args:
      needs: tokens, completion tokens and slots of each unit [units, 3].
      shape: capacities of a row.
    """
    capacity = (shape.length, shape.completion_length, shape.slots)
    rows = [0] * len(needs)
    # Remaining capacity of each row, sorted by tokens: (tokens, row, completion tokens, slots). Plain numbers, for
    # speed.
    left: list[tuple[int, int, int, int]] = []
    num_rows = 0
    listed = needs.tolist()
    for i in np.argsort(-needs[:, 0], kind="stable").tolist():
        tokens, completions, slots = listed[i]
        at = bisect.bisect_left(left, (tokens,))
        while at < len(left) and (left[at][2] < completions or left[at][3] < slots):
            at += 1
        if at < len(left):
            room, row, room_completions, room_slots = left.pop(at)
        else:
            (room, room_completions, room_slots), row = capacity, num_rows
            num_rows += 1
        rows[i] = row
        bisect.insort(left, (room - tokens, row, room_completions - completions, room_slots - slots))
    return rows


def _starts(rows: np.ndarray, needs: np.ndarray) -> np.ndarray:
    """Amount of each resource that precedes each unit in its row, longest unit first [units, 3]."""
    order = np.lexsort((-needs[:, 0], rows))
    before = np.cumsum(needs[order], axis=0) - needs[order]
    is_first = np.diff(rows[order], prepend=-1) > 0
    starts = np.empty_like(needs)
    starts[order] = before - before[is_first][np.cumsum(is_first) - 1] if len(rows) else before
    return starts


def fill(
    packing: Packing,
    sequence: Callable[[int], tuple[np.ndarray, np.ndarray]],
    *,
    num_microbatches: int,
    microbatch_rows: int,
    rows: slice,
    shape: RowShape,
) -> PackedRows:
    """Fills some rows of every microbatch with their sequences.

    Args:
      packing: the place of each sequence; row r is row r % R of microbatch r // R.
      sequence: returns the ids of sequence i's prompt and completion; called only for the requested rows.
      num_microbatches: M.
      microbatch_rows: R, over all hosts.
      rows: contiguous range of the R rows to fill.
      shape: capacity of a row.

    Returns:
      NumPy arrays [M, requested rows, …]; rows without sequences have segment ids 0.
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


def fill_figures(
    packing: Packing,
    figures: Callable[[int], np.ndarray],
    *,
    num_microbatches: int,
    microbatch_rows: int,
    rows: slice,
    shape: tuple[int, int],
) -> np.ndarray:
    """Places figures of completion tokens where `fill` places the tokens.

    Args:
      packing: as for `fill`.
      figures: returns those of sequence i [completion, figures]; called only for the requested rows.
      num_microbatches: M.
      microbatch_rows: R, over all hosts.
      rows: contiguous range of the R rows to fill.
      shape: capacity of a row in completion tokens, and the number of figures.

    Returns:
      float32 [M, requested rows, C, figures]; 0 where there is no token.
    """
    first, last, _ = rows.indices(microbatch_rows)
    filled = np.zeros((num_microbatches, last - first, *shape), np.float32)
    microbatch, row = np.divmod(packing.rows, microbatch_rows)
    for i in np.flatnonzero((row >= first) & (row < last)):
        found, start = figures(int(i)), packing.completion_starts[i]
        filled[microbatch[i], row[i] - first, start : start + len(found)] = found
    return filled
