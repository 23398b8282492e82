"""Indices in memory, their schedules, and the sequences of packed rows read back from the masks."""

from pathlib import Path

import numpy as np

from kto_jax.data.index.index import Index
from tests import synthetic

EOS, BOS = 2, 1


def fake_index(lengths, prompts=None, *, max_prompt_length=512, seed=0):
    """An index in memory: `lengths` are (prompt, completion) pairs, `prompts` say which rows share a prompt."""
    rng = np.random.default_rng(seed)
    num_prompt, num_completion = np.array(lengths).T
    offsets = np.concatenate([[0], np.cumsum(num_prompt + num_completion)])
    tokens = rng.integers(3, 500, offsets[-1]).astype(np.int32)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = BOS, EOS
    count = len(lengths)
    hashes = np.arange(count) if prompts is None else np.array(prompts)
    manifest = {"data": {"max_prompt_length": max_prompt_length}, "tokenizer": {"bos_id": BOS}}
    return Index(
        directory=Path(),
        manifest=manifest,
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=num_prompt.astype(np.int32),
        desirable=rng.random(count) < 0.5,
        weights=(1 + rng.random(count)).astype(np.float32),
        scores=rng.normal(size=count).astype(np.float32),
        rejected=np.full(count, -1, np.int64),
        prompt_hashes=hashes.astype(np.uint64),
        splits=np.zeros(count, np.uint8),
        places=np.zeros((count, 2), np.int64),
    )


def paired_index(num_pairs, *, num_prompts=None, lengths=(2, 15, 25), seed=0):
    """Rows 2k and 2k + 1 are the chosen and the rejected completion of one prompt."""
    rng = np.random.default_rng(seed)
    least, most_prompt, most_completion = lengths
    prompts = np.repeat(rng.integers(least, most_prompt, num_pairs), 2)
    completions = rng.integers(least, most_completion, 2 * num_pairs)
    hashes = np.repeat(rng.integers(0, num_prompts, num_pairs) if num_prompts else np.arange(num_pairs), 2)
    index = fake_index(np.stack([prompts, completions], axis=1).tolist(), hashes, seed=seed)
    index.rejected[::2] = np.arange(1, 2 * num_pairs, 2)
    index.desirable[:] = np.arange(2 * num_pairs) % 2 == 0
    return index


def random_index(count, *, num_prompts=None, seed=0):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, num_prompts, count) if num_prompts else None
    return fake_index(rng.integers((2, 2), (15, 25), (count, 2)).tolist(), prompts, seed=seed)


def make_schedule(index, **changes):
    settings = {"batch_size": 8, "seed": 0, "epochs": 2, "row_length": 64, "microbatch_rows": 4}
    settings |= {"completion_length": 48, "max_length": 48} | changes
    return synthetic.make_schedule(index, settings.pop("ids", None), **settings)


def make_paired_schedule(index, **changes):
    settings = {"row_length": 128, "completion_length": 96, "paired": True, "ids": index.pairs("train")}
    return make_schedule(index, **settings | changes)


def unpack(packed, by_slot=None):
    """Every sequence of packed rows as (prompt ids, completion ids, value of its slot), read from the masks."""
    sequences = []
    for at in np.ndindex(packed.tokens.shape[:-1]):
        slots = packed.filled.shape[-1]
        for slot in range(slots):
            inside = packed.segment_ids[at] == slot + 1
            targets = packed.target_segments[at] == slot + 1
            assert packed.filled[at][slot] == inside.any() == targets.any()
            if not inside.any():
                continue
            ids = packed.tokens[at][inside]
            assert packed.positions[at][inside].tolist() == list(range(len(ids)))
            completion = packed.targets[at][targets]
            predictors = packed.predictors[at][targets]
            assert (np.diff(np.flatnonzero(inside)) == 1).all() and (np.diff(predictors) == 1).all()
            assert packed.tokens[at][predictors + 1].tolist() == completion.tolist() == ids[-len(completion) :].tolist()
            assert (packed.segment_ids[at][predictors] == slot + 1).all()
            value = None if by_slot is None else tuple(array[at][slot] for array in by_slot)
            sequences.append((ids[: -len(completion)].tolist(), completion.tolist(), value))
        assert (packed.tokens[at][packed.segment_ids[at] == 0] == 0).all()
    return sorted(sequences)


def pairs_of(packed):
    """The (prompt ids, completion ids) of slots 2k and 2k + 1 of every row, None for an empty slot."""
    found = []
    for at in np.ndindex(packed.tokens.shape[:-1]):
        for slot in range(0, packed.filled.shape[-1], 2):
            pair = []
            for member in (slot + 1, slot + 2):
                ids = packed.tokens[at][packed.segment_ids[at] == member].tolist()
                completion = packed.targets[at][packed.target_segments[at] == member].tolist()
                pair.append((ids[: len(ids) - len(completion)], completion) if ids else None)
            if pair != [None, None]:
                found.append(tuple(pair))
    return sorted(found)
