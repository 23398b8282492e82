"""The schedule: which rows a step trains on, who is paired with whom, and where each lies in the packed rows.

Pure arithmetic over the index: no iterator has a state, so any step can be made at any time on any number of hosts.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.data.batches.packing import Packing, RowShape, fill, num_slots, pack, power_of_two
from kto_jax.data.batches.prefetch import Loaders
from kto_jax.data.batches.reference_logps import ReferenceLogps
from kto_jax.data.index.index import Index
from kto_jax.data.permutation import permute
from kto_jax.data.rows.sources import Visits
from kto_jax.data.truncation import cut_prompt, fit_lengths
from kto_jax.shapes import FeedbackBatch, PackedRows

_NO_SUFFIX = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class StepSequences:
    """What a step reads.

    Attributes:
      rows: row ids of the global batch, in its order; of pairs chosen, rejected, chosen, rejected, … [sequences].
      partners: for each, the row whose completion is unrelated to its prompt, or -1 where the batch has none, or none
        are wanted [sequences].
      epoch: from 0.
    """

    rows: np.ndarray
    partners: np.ndarray
    epoch: int


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Where the sequences of a step lie; `unrelated` are the rows of its unmatched prompts and completions."""

    shape: RowShape
    matched: Packing
    unmatched: Packing
    unrelated: tuple[np.ndarray, np.ndarray]


class Schedule:
    """The steps of a run over some rows of an index.

    Args:
      index: the rows.
      rows: row ids to visit once an epoch; with `paired`, those of the chosen completions.
      batch_size: examples a step (with `paired`, pairs), over all hosts; the last step of an epoch may have fewer.
      seed: chooses the order of each epoch.
      epochs: how often the rows are visited.
      weights: how often an epoch visits each row of each source; None visits all rows once [sources].
      row_length: tokens of a packed row (L). Of several, each step takes the one that leaves it the least padding; the
        training step is compiled for each.
      microbatch_rows: packed rows of a microbatch, over all hosts (R).
      completion_length: completion tokens that a packed row has room for (C); of several row lengths, the shortest.
      max_length: most tokens of prompt and completion together.
      shuffle: False visits the rows in the order given.
      paired: each row comes with its rejected completion, in slots 2k and 2k + 1 of the same packed row.
      unmatched: whether prompts with unrelated completions are packed too.
      suffixes: ids that end every prompt, (before undesirable, before desirable completions). They count as prompt and
        are never cut.

    Raises:
      ConfigError: there are no rows, a row is not the chosen one of a pair, or a sequence or pair may not fit a packed
        row.
    """

    def __init__(
        self,
        index: Index,
        rows: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        weights: np.ndarray | None = None,
        row_length: int | Sequence[int],
        microbatch_rows: int,
        completion_length: int,
        max_length: int,
        shuffle: bool = True,
        paired: bool = False,
        unmatched: bool = True,
        suffixes: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        assert suffixes is None or not (paired or unmatched)
        self._index = index
        self._rows = np.asarray(rows, np.int64)
        self._visits = Visits(self._rows, index.places[:, 0], weights, seed=seed)
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._microbatch_rows, self._max_length = microbatch_rows, max_length
        self._unit, self._unmatched, self._suffixes = 2 if paired else 1, unmatched, suffixes
        self._max_prompt_length = int(index.manifest["data"]["max_prompt_length"])
        self._bos_id = index.manifest["tokenizer"]["bos_id"]
        self._reference: ReferenceLogps | None = None
        self._check_rows()
        sequences = self._sequences(self._rows)
        lengths = self._fit(sequences, sequences)
        row_lengths = [row_length] if isinstance(row_length, int) else sorted(set(row_length))
        self._check_fit(int(self._of_units(lengths[1]).max()), row_lengths[0], completion_length)
        if self._visits.is_weighted:
            # All rows must fit; how much a step holds is a matter of those that it visits.
            sequences = self._sequences(self._visits.at(np.arange(len(self._visits)), 0))
            lengths = self._fit(sequences, sequences)
        # A power of two, and at least 2 for pairs: a row holds two sequences of any length, and a batch has two.
        slots = num_slots(lengths[0] + lengths[1], row_lengths[-1], batch_size * self._unit)
        self._shapes = [RowShape(n, round(completion_length * n / row_lengths[0]), slots) for n in row_lengths]
        self._base = self._base_microbatches(self._of_units(lengths[0]), self._of_units(lengths[1]))
        self.steps_per_epoch = -(-len(self._visits) // batch_size)
        self.num_steps = self.steps_per_epoch * epochs

    @property
    def num_examples(self) -> int:
        """Examples (with `paired`, pairs) that an epoch visits."""
        return len(self._visits)

    @property
    def num_slots(self) -> int:
        """Examples that a packed row has room for (S); even where they are pairs."""
        return self._shapes[0].slots

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of a packed row, shortest first."""
        return tuple(shape.length for shape in self._shapes)

    @property
    def longest_row(self) -> RowShape:
        """What a packed row of the longest length has room for."""
        return self._shapes[-1]

    @property
    def max_sequences(self) -> int:
        """Most sequences of a step; a pair is two."""
        return self._batch_size * self._unit

    @property
    def microbatch_rows(self) -> int:
        """Packed rows of a microbatch, over all hosts (R)."""
        return self._microbatch_rows

    @property
    def reads_unmatched(self) -> bool:
        """Whether prompts with unrelated completions are packed too."""
        return self._unmatched

    @property
    def key(self) -> str:
        """Digest of all that decides which sequences each step reads, and where they are cut."""
        index = [self._index.manifest[name] for name in ("key", "content_sha256")]
        order = [self._batch_size, self._seed, self._shuffle, self.num_steps, self._unit, self._unmatched]
        parts = [*index, *order, self._max_length, self._max_prompt_length]
        return hashlib.sha256(json.dumps(parts).encode() + self._visits.digest()).hexdigest()

    def with_reference_logps(self, reference: ReferenceLogps) -> Schedule:
        """The same schedule, whose batches hold the reference's log-probabilities."""
        schedule = copy.copy(self)
        schedule._reference = reference
        return schedule

    def step(self, step: int) -> StepSequences:
        """Which rows a step reads, and their partners: a function of the index, the seed and the step alone.

        Args:
          step: from 0 to num_steps - 1.

        Returns:
          The step's rows.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        size = len(self._visits)
        positions = np.arange(k * self._batch_size, min((k + 1) * self._batch_size, size))
        if self._shuffle:
            positions = permute(positions, size, (self._seed, epoch))
        rows = self._visits.at(positions, epoch)
        partners = np.full(len(rows), -1, np.int64)
        if self._unmatched:
            partners = pair(self._index.prompt_hashes[rows])
        sequences = self._sequences(rows)
        # Member m of a pair takes the completion of member m of the partner pair.
        partner_rows = np.where(partners[:, None] < 0, -1, sequences.reshape(-1, self._unit)[partners])
        return StepSequences(sequences, partner_rows.reshape(-1), epoch)

    def batch(self, step: int, rows: slice = slice(None)) -> FeedbackBatch:
        """The packed batch of a step.

        Args:
          step: from 0 to num_steps - 1.
          rows: this host's contiguous part of the R rows of every microbatch; the default is all.

        Returns:
          NumPy arrays. M is a power of two and the same for all but unusually long steps; that of `unmatched` is 0
          where the schedule leaves it out.
        """
        schedule = self.step(step)
        packed = self._packed(schedule)
        num_matched, num_unmatched = (self._num_microbatches(p) for p in (packed.matched, packed.unmatched))
        num_microbatches = max(power_of_two(max(num_matched, num_unmatched)), self._base)
        room = num_microbatches if self._unmatched else 0
        fill_rows = functools.partial(self._fill, shape=packed.shape, rows=rows)
        by_slot = functools.partial(self._by_slot, packed.matched, num_microbatches, rows)
        batch = FeedbackBatch(
            matched=fill_rows(packed.matched, schedule.rows, schedule.rows, num_microbatches),
            desirable=by_slot(self._index.desirable[schedule.rows]),
            weights=by_slot(self._weights(schedule.rows)),
            scores=by_slot(self._index.scores[schedule.rows]),
            unmatched=fill_rows(packed.unmatched, *packed.unrelated, room),
            num_matched=np.int32(num_matched),
            num_unmatched=np.int32(num_unmatched),
        )
        if self._reference is None:
            return batch
        unrelated = self._reference.unmatched[step, : len(schedule.rows)][schedule.partners >= 0]
        return dataclasses.replace(
            batch,
            matched_reference=by_slot(self._reference.matched[schedule.rows]),
            unmatched_reference=self._by_slot(packed.unmatched, room, rows, unrelated),
        )

    def by_sequence(self, step: int, matched: np.ndarray, unmatched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What was found for the slots of a step's batch, in the order of the step's sequences.

        Args:
          step: from 0 to num_steps - 1.
          matched: of the slots of `matched` [M, R, S]; of all hosts' rows.
          unmatched: of those of `unmatched`, likewise; not read where the schedule leaves it out.

        Returns:
          The numbers of each sequence behind its own prompt and of each prompt's unrelated sequence, 0 where it has
          none, each [sequences].
        """
        schedule = self.step(step)
        packed = self._packed(schedule)
        unrelated = np.zeros(len(schedule.rows), matched.dtype)
        if self._unmatched:
            unrelated[schedule.partners >= 0] = _at_slots(unmatched, packed.unmatched)
        return _at_slots(matched, packed.matched), unrelated

    def _packed(self, schedule: StepSequences) -> _Packed:
        """Where each sequence of a step lies, in rows of the length that suits it."""
        has_partner = schedule.partners >= 0
        unrelated = (schedule.rows[has_partner], schedule.partners[has_partner])
        return min(
            (
                _Packed(
                    shape, self._pack(schedule.rows, schedule.rows, shape), self._pack(*unrelated, shape), unrelated
                )
                for shape in self._shapes
            ),
            key=self._cost,
        )

    def _cost(self, packed: _Packed) -> int:
        """Tokens that pass through the model. The matched rows have a backward pass, which takes as long again."""
        microbatches = 2 * self._num_microbatches(packed.matched) + self._num_microbatches(packed.unmatched)
        return microbatches * self._microbatch_rows * packed.shape.length

    def _num_microbatches(self, packing: Packing) -> int:
        return math.ceil(packing.num_rows / self._microbatch_rows)

    def _sequences(self, rows: np.ndarray) -> np.ndarray:
        """The rows themselves, or the chosen and the rejected row of each pair, one after the other."""
        return rows if self._unit == 1 else np.stack([rows, self._index.rejected[rows]], axis=1).reshape(-1)

    def _of_units(self, lengths: np.ndarray) -> np.ndarray:
        """Of each row, or of each pair together."""
        return lengths.reshape(-1, self._unit).sum(axis=1)

    def _fit(self, prompts: np.ndarray, completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens kept of each prompt, its suffix included, and of each completion."""
        suffix = self._suffix_lengths(completions)
        num_prompt, num_completion = fit_lengths(
            self._index.prompt_lengths[prompts],
            self._index.num_completion(completions),
            max_length=self._max_length - suffix,
            max_prompt_length=self._max_prompt_length - suffix,
        )
        # Both completions of a pair are judged behind the same prompt, though the longer one may leave it less room.
        shared = np.repeat(num_prompt.reshape(-1, self._unit).min(axis=1), self._unit)
        return shared + suffix, num_completion

    def _suffix_lengths(self, completions: np.ndarray) -> np.ndarray:
        if self._suffixes is None:
            return np.zeros(len(completions), np.int64)
        return np.where(self._index.desirable[completions], len(self._suffixes[1]), len(self._suffixes[0]))

    def _pack(self, prompts: np.ndarray, completions: np.ndarray, shape: RowShape) -> Packing:
        return pack(*self._fit(prompts, completions), shape, unit=self._unit)

    def _fill(
        self,
        packing: Packing,
        prompts: np.ndarray,
        completions: np.ndarray,
        num_microbatches: int,
        *,
        shape: RowShape,
        rows: slice,
    ) -> PackedRows:
        num_prompt, num_completion = self._fit(prompts, completions)

        def sequence(i: int) -> tuple[np.ndarray, np.ndarray]:
            row = completions[i]
            completion = self._index.completion(row)[: num_completion[i]]
            suffix = _NO_SUFFIX if self._suffixes is None else self._suffixes[int(self._index.desirable[row])]
            prompt = cut_prompt(self._index.prompt(prompts[i]), int(num_prompt[i]) - len(suffix), self._bos_id)
            return np.concatenate([prompt, suffix]), completion

        def placed_sequence(i: int) -> tuple[np.ndarray, np.ndarray]:
            try:
                return sequence(i)
            except Exception as error:
                error.add_note(f"at {self._index.place(completions[i])}")
                raise

        return fill(
            packing,
            placed_sequence,
            num_microbatches=num_microbatches,
            microbatch_rows=self._microbatch_rows,
            rows=rows,
            shape=shape,
        )

    def _by_slot(self, packing: Packing, num_microbatches: int, rows: slice, values: np.ndarray) -> np.ndarray:
        """The value of the sequence in each slot, 0 in empty slots [M, rows, S]."""
        slots = np.zeros((num_microbatches * self._microbatch_rows, self.num_slots), values.dtype)
        slots[packing.rows, packing.slots] = values
        return slots.reshape(num_microbatches, self._microbatch_rows, self.num_slots)[:, rows]

    def _weights(self, sequences: np.ndarray) -> np.ndarray:
        """The weight of each sequence; both of a pair have the geometric mean, so that a 0 on either side counts."""
        of_units = self._index.weights[sequences].reshape(-1, self._unit)
        return np.repeat(np.prod(of_units, axis=1) ** np.float32(1 / self._unit), self._unit)

    def _check_rows(self) -> None:
        if not len(self._rows):
            raise ConfigError(
                "no rows to visit: the split is empty. At least one row is needed. Raise its share of the data."
            )
        alone = int(np.sum(self._index.rejected[self._rows] < 0)) if self._unit == 2 else 0
        if alone:
            raise ConfigError(
                f"{alone} of {len(self._rows)} rows have no rejected completion. A schedule of pairs takes the rows of "
                "chosen completions. Pass index.pairs(split)."
            )

    def _check_fit(self, longest_completion: int, row_length: int, completion_length: int) -> None:
        needed = self._unit * self._max_length
        if needed > row_length and self._unit == 2:
            raise ConfigError(
                f"a pair of data.max_length={self._max_length} does not fit a row of row_length={row_length} tokens. "
                f"A row must hold both completions of a pair, each with its prompt: {needed} tokens. "
                "Set config.row_length to twice data.max_length."
            )
        if needed > row_length:
            raise ConfigError(
                f"data.max_length={self._max_length} does not fit a row of row_length={row_length} tokens. "
                "A row must hold at least one example. Set config.row_length to data.max_length or more."
            )
        if longest_completion > completion_length:
            longest = "completion has" if self._unit == 1 else "pair's completions have"
            raise ConfigError(
                f"the longest {longest} {longest_completion} tokens, and a row has room for {completion_length} "
                "completion tokens (completion_share of row_length). A row must hold the longest completion. "
                "Raise config.completion_share, or lower config.data.max_length."
            )
        self._check_suffixes()

    def _check_suffixes(self) -> None:
        longest = self._index.num_completion(self._rows) + self._suffix_lengths(self._rows)
        if self._suffixes is not None and longest.max() > self._max_length - 1:
            raise ConfigError(
                f"the longest completion and the control tokens before it have {longest.max()} tokens, which leaves no "
                f"prompt within data.max_length={self._max_length}. At least one token of the prompt is kept. "
                "Raise config.data.max_length, or shorten the control tokens."
            )

    def _base_microbatches(self, num_prompt: np.ndarray, num_completion: np.ndarray) -> int:
        """Microbatches that nearly all steps fit into: the mean of what a batch needs and three standard deviations.

        A step that needs more takes the next power of two, and the training step is compiled once more for it.
        """
        batch = min(self._batch_size, len(self._visits))
        total, shape = num_prompt + num_completion, self._shapes[0]
        needs = (
            _upper(total, batch) / shape.length,
            _upper(num_completion, batch) / shape.completion_length,
            batch * self._unit / shape.slots,
        )
        # A row may keep a tail: at most about half of a typical sequence, or pair.
        slack = 1.0 + 0.5 * float(total.mean()) / shape.length
        return power_of_two(math.ceil(max(needs) * slack / self._microbatch_rows))


def pair(prompt_hashes: np.ndarray) -> np.ndarray:
    """Pairs every example of a batch with the next one, cyclically, whose prompt differs.

        prompts    a a b c a     next with another prompt
        partners   2 2 3 4 2

    Args:
      prompt_hashes: equal where the prompts are equal [batch].

    Returns:
      Positions in the batch, or -1 everywhere if all prompts are the same [batch], int64.
    """
    count = len(prompt_hashes)
    # Positions whose successor has another prompt: the partner of i is the successor of the first such one from i on.
    ends = np.flatnonzero(prompt_hashes != np.roll(prompt_hashes, -1))
    if not len(ends):
        return np.full(count, -1, np.int64)
    first = np.searchsorted(ends, np.arange(count))
    return (ends[first % len(ends)] + 1) % count


def prefetch(
    function: Callable[[int], Any],
    steps: Iterable[int],
    *,
    finish: Callable[[Any], Any] = lambda batch: batch,
    num_loaders: int = 0,
    depth: int = 2,
) -> Iterator[Any]:
    """Computes `finish(function(step))` for each step ahead of time.

    Args:
      function: makes a step's batch, in one background thread; with loaders in their processes, to which it is pickled
        (a schedule's `batch` can be, a lambda cannot).
      steps: which steps, in order.
      finish: what is left to do in this process, in the background thread: placing the batch on devices.
      num_loaders: processes that make batches, each one ahead; 0 for none.
      depth: how many finished results are kept ahead.

    Yields:
      The results in order. What either function raises is raised here, in its turn.
    """
    with contextlib.ExitStack() as stack:
        batches: Iterator[Any] = map(function, steps)
        if num_loaders:
            batches = iter(stack.enter_context(contextlib.closing(Loaders(function, steps, num_loaders))))
        end = object()

        def make() -> Any:
            batch = next(batches, end)
            return end if batch is end else finish(batch)

        # The thread ends before the loaders: it may be waiting for one.
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch"))
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            while True:
                while len(pending) < depth:
                    pending.append(thread.submit(make))
                if (result := pending.popleft().result()) is end:
                    return
                yield result
        finally:
            for future in pending:
                future.cancel()


def _at_slots(values_MRS: np.ndarray, packing: Packing) -> np.ndarray:
    return values_MRS.reshape(-1, values_MRS.shape[-1])[packing.rows, packing.slots]


def _upper(lengths: np.ndarray, batch: int) -> float:
    return min(
        batch * float(lengths.mean()) + 3 * math.sqrt(batch) * float(lengths.std()), batch * float(lengths.max())
    )
