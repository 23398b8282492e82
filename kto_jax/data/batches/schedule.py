"""The schedule: the sequences of each step, the unrelated completions for z0, and their places in packed rows.

Pure, stateless arithmetic over the index: any step can be computed at any time on any number of hosts.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.data.batches.cutting import Controls, Cutter
from kto_jax.data.batches.packing import Packing, RowLimits, RowShape, fill, fill_figures, num_slots, pack
from kto_jax.data.batches.partners import find_partners
from kto_jax.data.batches.reference_logps import ReferenceLogps
from kto_jax.data.batches.visits import Visits
from kto_jax.data.index.index import Index
from kto_jax.data.permutation import permute
from kto_jax.shapes import SAMPLED, FeedbackBatch, PackedRows, Sampled, power_of_two


@dataclasses.dataclass(frozen=True)
class Order:
    """How often and in which order sequences are visited.

    Attributes:
      batch_size: examples (sequences, or pairs) per step, over all hosts; the last step of an epoch may have fewer.
      seed: selects the order of each epoch.
      epochs: number of epochs.
      shuffle: False keeps the given order.
      weights: visits of each sequence of each source per epoch; None visits all once [sources].
    """

    batch_size: int
    seed: int
    epochs: int = 1
    shuffle: bool = True
    weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class StepSequences:
    """The sequences of a step.

    Attributes:
      ids: sequences of the global batch, in order; for pairs chosen, rejected, chosen, rejected, … [sequences].
      partners: for each, the sequence with the unrelated completion for its prompt, or -1 if the batch has none or the
        schedule needs none [sequences].
      epoch: from 0.
    """

    ids: np.ndarray
    partners: np.ndarray
    epoch: int

    @property
    def unrelated(self) -> tuple[np.ndarray, np.ndarray]:
        """The sequences whose prompts have a partner, and their partners."""
        has_partner = self.partners >= 0
        return self.ids[has_partner], self.partners[has_partner]


@dataclasses.dataclass(frozen=True)
class _Packed:
    """The places of a step's sequences, in rows of one shape."""

    shape: RowShape
    matched: Packing
    unmatched: Packing


class Schedule:
    """The steps of a run over some sequences of an index.

    Args:
      index: the sequences.
      ids: the sequences to visit; with `paired`, the chosen ones.
      order: the order of visits.
      limits: limits of packed rows. If there are several row lengths, each step uses the cheapest.
      paired: each sequence comes with its rejected one, in slots 2k and 2k + 1 of the same packed row.
      unmatched: whether prompts with unrelated completions are packed too.
      controls: ids that end every prompt; not allowed with `paired` or `unmatched`.
      reads_sampled: whether batches hold the figures of sampled tokens, which the index must have.
      slots_for_any: whether a row has slots for sequences of any length, so that schedules over others, such as those
        of the next round, have the same shapes. Otherwise there are as many as the lengths need.

    Raises:
      ConfigError: there are no sequences, one is not the chosen one of a pair, or a sequence or pair might not fit a
        packed row.
    """

    def __init__(
        self,
        index: Index,
        ids: np.ndarray,
        order: Order,
        limits: RowLimits,
        *,
        paired: bool = False,
        unmatched: bool = True,
        controls: Controls | None = None,
        reads_sampled: bool = False,
        slots_for_any: bool = False,
    ):
        assert controls is None or not (paired or unmatched)
        self._index, self._order, self._limits = index, order, limits
        self._ids = np.asarray(ids, np.int64)
        self._visits = Visits(self._ids, index.places[:, 0], order.weights, seed=order.seed)
        self._unit, self._unmatched, self._controls = 2 if paired else 1, unmatched, controls
        self._cutter = Cutter(index, max_length=limits.max_length, unit=self._unit, controls=controls)
        self._reference: ReferenceLogps | None = None
        self._reads_sampled = reads_sampled
        self._check_ids()
        sequences = self._members(self._ids)
        lengths = self._cutter.lengths(sequences, sequences)
        self._check_fit(int(self._by_unit(lengths[1]).max()))
        if self._visits.is_weighted:
            # All sequences must fit; the typical size of a step depends only on the visited ones.
            sequences = self._members(self._visits.at(np.arange(len(self._visits)), 0))
            lengths = self._cutter.lengths(sequences, sequences)
        # A power of two, and at least 2 for pairs: a row fits two sequences of any length, and a batch has two.
        totals = np.ones(1) if slots_for_any else lengths[0] + lengths[1]
        slots = num_slots(totals, limits.lengths[-1], order.batch_size * self._unit)
        self._shapes = limits.shapes(slots)
        self._base = self._base_microbatches(self._by_unit(lengths[0]), self._by_unit(lengths[1]))
        self.steps_per_epoch = -(-len(self._visits) // order.batch_size)
        self.num_steps = self.steps_per_epoch * order.epochs

    @property
    def num_examples(self) -> int:
        """Examples (with `paired`, pairs) per epoch."""
        return len(self._visits)

    @property
    def num_slots(self) -> int:
        """Sequences that fit in a packed row (S); even for pairs."""
        return self._shapes[0].slots

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of packed rows in tokens, shortest first."""
        return self._limits.lengths

    @property
    def longest_row(self) -> RowShape:
        """The shape of a packed row of the longest length."""
        return self._shapes[-1]

    @property
    def max_sequences(self) -> int:
        """Maximum number of sequences of a step; a pair is two."""
        return self._order.batch_size * self._unit

    @property
    def microbatch_rows(self) -> int:
        """Packed rows per microbatch, over all hosts (R)."""
        return self._limits.microbatch_rows

    @property
    def reads_unmatched(self) -> bool:
        """Whether prompts with unrelated completions are packed too."""
        return self._unmatched

    @property
    def key(self) -> str:
        """Digest of all that determines the sequences of each step and their truncation."""
        index = [self._index.manifest[name] for name in ("key", "content_sha256")]
        order = [self._order.batch_size, self._order.seed, self._order.shuffle, self.num_steps]
        parts = [*index, *order, self._unit, self._unmatched, self._limits.max_length, self._cutter.max_prompt_length]
        return hashlib.sha256(json.dumps(parts).encode() + self._visits.digest()).hexdigest()

    def with_reference_logps(self, reference: ReferenceLogps) -> Schedule:
        """The same schedule with the reference's log-probabilities in its batches."""
        schedule = copy.copy(self)
        schedule._reference = reference
        return schedule

    def step(self, step: int) -> StepSequences:
        """The sequences of a step and their partners, which depend only on the index, the seed and the step.

        Args:
          step: from 0 to num_steps - 1.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        size, batch_size = len(self._visits), self._order.batch_size
        positions = np.arange(k * batch_size, min((k + 1) * batch_size, size))
        if self._order.shuffle:
            positions = permute(positions, size, (self._order.seed, epoch))
        ids = self._visits.at(positions, epoch)
        partners = np.full(len(ids), -1, np.int64)
        if self._unmatched:
            partners = find_partners(self._index.prompt_hashes[ids])
        members = self._members(ids)
        # Member m of a pair gets the completion of member m of the partner pair.
        partner_ids = np.where(partners[:, None] < 0, -1, members.reshape(-1, self._unit)[partners])
        return StepSequences(members, partner_ids.reshape(-1), epoch)

    def batch(self, step: int, rows: slice = slice(None)) -> FeedbackBatch:
        """The packed batch of a step.

        Args:
          step: from 0 to num_steps - 1.
          rows: this host's contiguous range of the R rows of every microbatch; the default is all.

        Returns:
          NumPy arrays. M is a power of two, and the same for all but unusually long steps; for `unmatched` it is 0 if
          the schedule has no unmatched rows.
        """
        sequences = self.step(step)
        packed = self._packed(sequences)
        num_matched, num_unmatched = (self._num_microbatches(p) for p in (packed.matched, packed.unmatched))
        num_microbatches = max(power_of_two(max(num_matched, num_unmatched)), self._base)
        room = num_microbatches if self._unmatched else 0
        fill_rows = functools.partial(self._fill, shape=packed.shape, rows=rows)
        by_slot = functools.partial(self._by_slot, packed.matched, num_microbatches, rows)
        batch = FeedbackBatch(
            matched=fill_rows(packed.matched, sequences.ids, sequences.ids, num_microbatches),
            desirable=by_slot(self._index.desirable[sequences.ids]),
            weights=by_slot(self._weights(sequences.ids)),
            scores=by_slot(self._index.scores[sequences.ids]),
            unmatched=fill_rows(packed.unmatched, *sequences.unrelated, room),
            num_matched=np.int32(num_matched),
            num_unmatched=np.int32(num_unmatched),
        )
        if self._reads_sampled:
            batch = dataclasses.replace(batch, sampled=self._sampled(packed, sequences.ids, num_microbatches, rows))
        if self._reference is None:
            return batch
        unrelated = self._reference.unmatched[step, : len(sequences.ids)][sequences.partners >= 0]
        return dataclasses.replace(
            batch,
            matched_reference=by_slot(self._reference.matched[sequences.ids]),
            unmatched_reference=self._by_slot(packed.unmatched, room, rows, unrelated),
        )

    def by_sequence(self, step: int, matched: np.ndarray, unmatched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reorders values from slots of a step's batch to sequences.

        Args:
          step: from 0 to num_steps - 1.
          matched: by slot of `matched`, over all hosts' rows [M, R, S].
          unmatched: likewise for `unmatched`; ignored if the schedule has no unmatched rows.

        Returns:
          The value of each sequence's own completion, and of each prompt's unrelated completion (0 if it has none),
          each [sequences].
        """
        sequences = self.step(step)
        packed = self._packed(sequences)
        unrelated = np.zeros(len(sequences.ids), matched.dtype)
        if self._unmatched:
            unrelated[sequences.partners >= 0] = _at_slots(unmatched, packed.unmatched)
        return _at_slots(matched, packed.matched), unrelated

    def _packed(self, sequences: StepSequences) -> _Packed:
        """The place of each sequence of a step, in rows of the cheapest length."""
        ids, unrelated = sequences.ids, sequences.unrelated
        packed = (_Packed(s, self._pack(ids, ids, s), self._pack(*unrelated, s)) for s in self._shapes)
        return min(packed, key=self._cost)

    def _cost(self, packed: _Packed) -> int:
        """Cost in tokens. Matched rows count twice, because they also have a backward pass."""
        microbatches = 2 * self._num_microbatches(packed.matched) + self._num_microbatches(packed.unmatched)
        return microbatches * self.microbatch_rows * packed.shape.length

    def _num_microbatches(self, packing: Packing) -> int:
        return math.ceil(packing.num_rows / self.microbatch_rows)

    def _members(self, ids: np.ndarray) -> np.ndarray:
        """The sequences themselves, or the chosen and the rejected one of each pair, adjacent."""
        return ids if self._unit == 1 else np.stack([ids, self._index.rejected[ids]], axis=1).reshape(-1)

    def _by_unit(self, lengths: np.ndarray) -> np.ndarray:
        """The length of each sequence, or the total of each pair."""
        return lengths.reshape(-1, self._unit).sum(axis=1)

    def _pack(self, prompts: np.ndarray, completions: np.ndarray, shape: RowShape) -> Packing:
        return pack(*self._cutter.lengths(prompts, completions), shape, unit=self._unit)

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
        num_prompt, num_completion = self._cutter.lengths(prompts, completions)

        def ids_of(i: int) -> tuple[np.ndarray, np.ndarray]:
            try:
                return self._cutter.cut(prompts[i], completions[i], int(num_prompt[i]), int(num_completion[i]))
            except Exception as error:
                error.add_note(f"at {self._index.place(completions[i])}")
                raise

        return fill(
            packing,
            ids_of,
            num_microbatches=num_microbatches,
            microbatch_rows=self.microbatch_rows,
            rows=rows,
            shape=shape,
        )

    def _sampled(self, packed: _Packed, sequences: np.ndarray, num_microbatches: int, rows: slice) -> Sampled:
        """The figures of the sequences' completion tokens, at the places of the tokens."""
        lengths = self._index.num_completion(sequences)
        figures = fill_figures(
            packed.matched,
            lambda i: self._index.sampled_figures(sequences[i])[: lengths[i]],
            num_microbatches=num_microbatches,
            microbatch_rows=self.microbatch_rows,
            rows=rows,
            shape=(packed.shape.completion_length, len(SAMPLED)),
        )
        return Sampled(*(np.ascontiguousarray(figures[..., number]) for number in range(len(SAMPLED))))

    def _by_slot(self, packing: Packing, num_microbatches: int, rows: slice, values: np.ndarray) -> np.ndarray:
        """The value of the sequence in each slot, 0 in empty slots [M, rows, S]."""
        slots = np.zeros((num_microbatches * self.microbatch_rows, self.num_slots), values.dtype)
        slots[packing.rows, packing.slots] = values
        return slots.reshape(num_microbatches, self.microbatch_rows, self.num_slots)[:, rows]

    def _weights(self, sequences: np.ndarray) -> np.ndarray:
        """The weight of each sequence; both of a pair get the geometric mean, so that a 0 on either side gives 0."""
        by_unit = self._index.weights[sequences].reshape(-1, self._unit)
        return np.repeat(np.prod(by_unit, axis=1) ** np.float32(1 / self._unit), self._unit)

    def _check_ids(self) -> None:
        if not len(self._ids):
            raise ConfigError(
                "no sequences to visit: the split is empty. At least one is needed. Raise its share of the data."
            )
        alone = int(np.sum(self._index.rejected[self._ids] < 0)) if self._unit == 2 else 0
        if alone:
            raise ConfigError(
                f"{alone} of {len(self._ids)} sequences have no rejected completion. A schedule of pairs needs the "
                "sequences of chosen completions. Pass index.pairs(split)."
            )

    def _check_fit(self, longest_completion: int) -> None:
        max_length = self._limits.max_length
        check_row_length(self._limits.lengths[0], max_length, in_pairs=self._unit == 2)
        if longest_completion > self._limits.completion_length:
            longest = "completion has" if self._unit == 1 else "pair's completions have"
            raise ConfigError(
                f"the longest {longest} {longest_completion} tokens, and a row has room for "
                f"{self._limits.completion_length} completion tokens (completion_share of row_length). A row must hold "
                "the longest completion. Raise config.completion_share, or lower config.data.max_length."
            )
        longest_reply = self._index.num_completion(self._ids) + self._cutter.control_lengths(self._ids)
        if self._controls is not None and longest_reply.max() > max_length - 1:
            raise ConfigError(
                f"the longest completion and the control tokens before it have {longest_reply.max()} tokens, which "
                f"leaves no prompt within data.max_length={max_length}. At least one token of the prompt is kept. "
                "Raise config.data.max_length, or shorten the control tokens."
            )

    def _base_microbatches(self, num_prompt: np.ndarray, num_completion: np.ndarray) -> int:
        """Microbatches that suffice for nearly all steps: a batch's mean need plus three standard deviations.

        A step that needs more uses the next power of two, for which the training step is compiled once more.
        """
        batch = min(self._order.batch_size, len(self._visits))
        total, shape = num_prompt + num_completion, self._shapes[0]
        needs = (
            _upper(total, batch) / shape.length,
            _upper(num_completion, batch) / shape.completion_length,
            batch * self._unit / shape.slots,
        )
        # The unused end of a row is at most about half of a typical sequence, or pair.
        slack = 1.0 + 0.5 * float(total.mean()) / shape.length
        return power_of_two(math.ceil(max(needs) * slack / self.microbatch_rows))


def _at_slots(values_MRS: np.ndarray, packing: Packing) -> np.ndarray:
    return values_MRS.reshape(-1, values_MRS.shape[-1])[packing.rows, packing.slots]


def _upper(lengths: np.ndarray, batch: int) -> float:
    return min(
        batch * float(lengths.mean()) + 3 * math.sqrt(batch) * float(lengths.std()), batch * float(lengths.max())
    )


def check_row_length(row_length: int, max_length: int, *, in_pairs: bool) -> None:
    """Refuses rows that do not hold the longest example.

    Args:
      row_length: tokens of a row.
      max_length: most tokens of a prompt and its completion.
      in_pairs: whether an example is two completions, each with its prompt.

    Raises:
      ConfigError: naming both.
    """
    if in_pairs and 2 * max_length > row_length:
        raise ConfigError(
            f"a pair of data.max_length={max_length} does not fit a row of row_length={row_length} tokens. "
            f"A row must hold both completions of a pair, each with its prompt: {2 * max_length} tokens. "
            "Set config.row_length to twice data.max_length."
        )
    if max_length > row_length:
        raise ConfigError(
            f"data.max_length={max_length} does not fit a row of row_length={row_length} tokens. "
            "A row must hold at least one example. Set config.row_length to data.max_length or more."
        )
