"""The feedback that `python -m benchmarks.kto` trains on, packed, padded, and as plain lists of tokens."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing import Lengths, log_normal_lengths, make_index
from configs import quickstart, tiny
from kto_jax.config import Config, resolve
from kto_jax.data.batches.packing import Packing, RowLimits, RowShape, fill
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.index.index import Index
from kto_jax.inspect import read_feedback
from kto_jax.models.weights.load import read_config
from kto_jax.objectives import make_objective
from kto_jax.shapes import FeedbackBatch, PackedRows
from kto_jax.training.inputs import choose_lengths

Sequences = list[tuple[list[int], list[int]]]


@dataclasses.dataclass(frozen=True)
class FeedbackSet:
    """A set that all contenders train on.

    Attributes:
      config: a user's kto_jax configuration for it; the peers' shared settings come from it.
      schedule: its packed batches.
      plain_remat: activation checkpointing of the plain step, so that it fits 24 GB.
    """

    config: Config
    schedule: Schedule
    plain_remat: str


def quickstart_set(model: str) -> FeedbackSet:
    """The quickstart unchanged: short reviews, 16 examples per step."""
    config = quickstart.get_config()
    config.model.path = model or config.model.path
    return _make_set(resolve(config), plain_remat="none")


def small_set(model: str) -> FeedbackSet:
    """Toy rows for a tiny model."""
    config = tiny.get_config()
    config.model.path = model or config.model.path
    config.row_length, config.microbatch_rows = 192, 2
    return _make_set(resolve(config), plain_remat="none")


def log_normal_set(model: str) -> FeedbackSet:
    """Chat-like lengths: median 250, 95th percentile 1,000, cap 2,048 tokens.

    The tokens are the quickstart's reviews, concatenated. A third of each example is completion; half of the examples
    are desirable.
    """
    config = quickstart.get_config()
    config.model.path = model or config.model.path
    with tempfile.TemporaryDirectory() as scratch:
        reviews, tokenizer = read_feedback(resolve(config), Path(scratch))
    lengths = log_normal_lengths(4_000)
    index = make_index(lengths)
    tokens = np.resize(reviews.tokens, index.tokens.shape).astype(np.int32)
    tokens[index.offsets[1:] - 1] = tokenizer.eos_id
    index = dataclasses.replace(index, tokens=tokens, weights=np.ones(len(lengths.prompt), np.float32))
    config.data.max_length, config.data.max_prompt_length = lengths.max_length, lengths.max_length // 2
    config.batch_size, config.microbatch_rows, config.completion_share = 8, 1, 0.4
    config.row_length = "auto"
    return _make_set(resolve(config), plain_remat="full", index=index)


def random_set(model: str) -> FeedbackSet:
    """Log-normal lengths as above, of random tokens, in rows of 4,096: needs no text and no tokenizer."""
    return _random_set(model, log_normal_lengths(4_000), row_length=4096, batch_size=32)


def small_random_set(model: str) -> FeedbackSet:
    """The same for a tiny model: short lengths, rows of 192."""
    lengths = log_normal_lengths(400)
    short = {name: np.maximum(getattr(lengths, name) // 32, 2) for name in ("prompt", "completion")}
    return _random_set(model, dataclasses.replace(lengths, **short, max_length=96), row_length=192, batch_size=8)


def _random_set(model: str, lengths: Lengths, row_length: int, batch_size: int) -> FeedbackSet:
    config = tiny.get_config()
    config.model.path = model or config.model.path
    vocab_size = read_config(Path(config.model.path)).vocab_size
    index = make_index(lengths)
    tokens = np.random.default_rng(0).integers(3, vocab_size, index.tokens.shape).astype(np.int32)
    index = dataclasses.replace(index, tokens=tokens, weights=np.ones(len(lengths.prompt), np.float32))
    config.data.max_length, config.data.max_prompt_length = lengths.max_length, lengths.max_length // 2
    config.batch_size, config.microbatch_rows, config.completion_share = batch_size, 2, 0.4
    config.row_length = row_length
    return _make_set(resolve(config), plain_remat="full", index=index)


SETS = {
    "quickstart": quickstart_set,
    "log_normal": log_normal_set,
    "small": small_set,
    "random": random_set,
    "small_random": small_random_set,
}


def _make_set(config: Config, *, plain_remat: str, index: Index | None = None) -> FeedbackSet:
    """The set's schedule; weights from the counts, and a constant learning rate, the same for all contenders."""
    if index is None:
        with tempfile.TemporaryDirectory() as scratch:
            index, _ = read_feedback(config, Path(scratch))
    sequences = index.sequences("train")
    labels = np.asarray(index.desirable)[sequences]
    options = make_objective(
        config.objective, num_desirable=int(labels.sum()), num_undesirable=int((~labels).sum())
    ).options
    shared = ("beta", "desirable_weight", "undesirable_weight")
    weights: dict[str, Any] = {name: float(options[name]) for name in shared}
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, **weights),
        optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0),
    )
    row_lengths = choose_lengths(config, index, sequences, paired=False)
    limits = RowLimits(
        row_lengths,
        completion_length=round(row_lengths[0] * config.completion_share),
        microbatch_rows=int(config.microbatch_rows),
        max_length=config.data.max_length,
    )
    order = Order(config.batch_size, config.seed)
    return FeedbackSet(config, Schedule(index, sequences, order, limits), plain_remat)


def sequences(rows: PackedRows) -> Sequences:
    """The prompts and completions in packed rows, slot by slot."""
    found = []
    for place in zip(*np.nonzero(rows.filled), strict=True):
        *row, slot = place
        ids = rows.tokens[*row][rows.segment_ids[*row] == slot + 1].tolist()
        split = len(ids) - int(np.sum(rows.target_segments[*row] == slot + 1))
        found.append((ids[:split], ids[split:]))
    return found


def as_lists(batch: FeedbackBatch) -> dict[str, list]:
    """The same examples as plain lists, for contenders that pad themselves.

    Every prompt has an unmatched completion, so that peers, which always make as many pairs, do the same work.
    """
    rows: dict[str, list] = {"matched": sequences(batch.matched), "unmatched": sequences(batch.unmatched)}
    assert len(rows["matched"]) == len(rows["unmatched"])
    assert np.all(batch.weights[batch.matched.filled] == 1)
    return rows | {"desirable": batch.desirable[batch.matched.filled].tolist()}


def pad_batch(batch: FeedbackBatch) -> FeedbackBatch:
    """The same examples with a row for each, padded to the longest, in one microbatch: packing switched off.

    Lengths are rounded up to a multiple of 8, so that few programs are compiled.
    """

    def by_row(values: np.ndarray) -> np.ndarray:
        return values[batch.matched.filled].reshape(1, -1, 1)

    return dataclasses.replace(
        batch,
        matched=_pad(batch.matched),
        unmatched=_pad(batch.unmatched),
        desirable=by_row(batch.desirable),
        weights=by_row(batch.weights),
        scores=by_row(batch.scores),
        num_matched=np.int32(1),
        num_unmatched=np.int32(1),
    )


def _pad(rows: PackedRows) -> PackedRows:
    found = sequences(rows)
    count = len(found)
    zeros = np.zeros(count, np.int64)

    def longest(lengths: list[int]) -> int:
        return -(-max(lengths) // 8) * 8

    return fill(
        Packing(np.arange(count), zeros, zeros, zeros, count),
        lambda i: (np.array(found[i][0]), np.array(found[i][1])),
        num_microbatches=1,
        microbatch_rows=count,
        rows=slice(None),
        shape=RowShape(
            longest([len(prompt) + len(completion) for prompt, completion in found]),
            longest([len(completion) for _, completion in found]),
            1,
        ),
    )


def padding(batches: list[FeedbackBatch]) -> float:
    """Share of padding in the model's input, matched and unmatched."""
    used = [batch.matched.segment_ids[: batch.num_matched] for batch in batches]
    used += [batch.unmatched.segment_ids[: batch.num_unmatched] for batch in batches]
    return 1 - sum(int((ids > 0).sum()) for ids in used) / sum(ids.size for ids in used)


def padding_shares(schedule: Schedule, num_steps: int = 50) -> dict[str, float]:
    """Share of padding in a schedule's first batches, packed, and padded to the longest of the batch."""
    batches = [schedule.batch(step) for step in range(min(num_steps, schedule.num_steps))]
    return {"packed": padding(batches), "padded": padding([pad_batch(batch) for batch in batches])}
