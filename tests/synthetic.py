"""An index of random sequences, made in memory, and schedules over it, for tests of everything behind them."""

from pathlib import Path

import numpy as np

from kto_jax.data.batches.packing import RowLimits
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.index.index import Index


def make_index(
    num_rows=64, *, vocab_size=98, min_length=20, max_length=38, num_prompts=None, seed=0, paired=False
) -> Index:
    """Rows with min_length to max_length tokens, about a third of them prompt; each prompt is its own by default.

    With `paired`, num_rows is even and rows 2k and 2k + 1 are the chosen and the rejected completion of one prompt:
    they share the prompt's ids, its hash and the weight, and only the first is desirable.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(min_length, max_length + 1, num_rows)
    prompt_lengths = (lengths // 3).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(3, vocab_size, offsets[-1]).astype(np.int32)
    prompt_hashes = (np.arange(num_rows) % (num_prompts or num_rows)).astype(np.uint64)
    desirable = rng.random(num_rows) < 0.4
    weights = rng.choice([0.5, 1.0, 2.0], num_rows).astype(np.float32)
    rejected = np.full(num_rows, -1, np.int64)
    if paired:
        prompt_lengths[1::2] = prompt_lengths[::2] = np.minimum(prompt_lengths[::2], prompt_lengths[1::2])
        prompt_hashes = np.repeat(prompt_hashes[: num_rows // 2], 2)
        desirable = np.arange(num_rows) % 2 == 0
        weights[1::2] = weights[::2]
        rejected[::2] = np.arange(1, num_rows, 2)
    for row in np.flatnonzero(rejected >= 0):
        length = prompt_lengths[row]
        tokens[offsets[row + 1] : offsets[row + 1] + length] = tokens[offsets[row] : offsets[row] + length]
    return Index(
        directory=Path("none"),
        manifest={"data": {"max_prompt_length": max_length // 2}, "tokenizer": {"bos_id": None}, "key": "none"},
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=prompt_lengths,
        desirable=desirable,
        weights=weights,
        scores=rng.normal(size=num_rows).astype(np.float32),
        rejected=rejected,
        prompt_hashes=prompt_hashes,
        splits=np.zeros(num_rows, np.uint8),
        places=np.stack([np.zeros(num_rows), np.arange(num_rows)], axis=1).astype(np.int64),
    )


def make_schedule(
    index, ids=None, *, batch_size, seed=0, epochs=1, shuffle=True, weights=None, row_length, completion_length=None,
    microbatch_rows, max_length, **options,
) -> Schedule:  # fmt: skip
    """A schedule over all sequences, or some, from the fields of its records; completions may fill a row by default."""
    lengths = (row_length,) if isinstance(row_length, int) else tuple(sorted(set(row_length)))
    order = Order(batch_size, seed, epochs, shuffle, weights)
    limits = RowLimits(lengths, completion_length or lengths[0], microbatch_rows, max_length)
    return Schedule(index, np.arange(len(index.desirable)) if ids is None else ids, order, limits, **options)
