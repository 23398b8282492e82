"""An index of random rows, made in memory, for tests of everything behind it."""

from pathlib import Path

import numpy as np

from kto_jax.data.index import Index


def make_index(num_rows=64, *, vocab_size=98, min_length=20, max_length=38, num_prompts=None, seed=0) -> Index:
    """Rows with min_length to max_length tokens, about a third of them prompt; each prompt is its own by default."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(min_length, max_length + 1, num_rows)
    prompt_lengths = (lengths // 3).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Index(
        directory=Path("none"),
        manifest={"data": {"max_prompt_length": max_length // 2}, "tokenizer": {"bos_id": None}, "key": "none"},
        tokens=rng.integers(3, vocab_size, offsets[-1]).astype(np.int32),
        offsets=offsets,
        prompt_lengths=prompt_lengths,
        desirable=rng.random(num_rows) < 0.4,
        weights=rng.choice([0.5, 1.0, 2.0], num_rows).astype(np.float32),
        prompt_hashes=(np.arange(num_rows) % (num_prompts or num_rows)).astype(np.uint64),
        splits=np.zeros(num_rows, np.uint8),
        places=np.stack([np.zeros(num_rows), np.arange(num_rows)], axis=1).astype(np.int64),
    )
