"""Rows as token ids, encoded, hashed and cut in worker processes."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kto_jax.data.rows.records import Feedback, Preference, completions_of
from kto_jax.data.rows.turns import SAME_COMPLETIONS
from kto_jax.data.tokens.encoder import Encoder, EncodingError
from kto_jax.data.tokens.tokenizer import TokenizerInfo, kept_encoder, quieten_transformers
from kto_jax.data.truncation import cut_prompt
from kto_jax.shapes import SAMPLED


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a row; the fields are those of `DataConfig`, and the size of the model's vocabulary."""

    max_length: int
    max_prompt_length: int
    long_completion: str
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """Rows returned by a worker. A pair is accepted or rejected as a whole, and counts as two accepted completions.

    Attributes:
      reasons: why a row is rejected, or None; one for each row.
      tokens: ids of prompt and completion of all accepted completions, one after the other, int32.
      prompt_lengths: tokens of each accepted completion's prompt.
      completion_lengths: tokens of each accepted completion, its EOS included.
      prompt_hashes: uint64 of each accepted completion's whole prompt, as `EncodedRecord.canonical` has it.
      pair_hashes: uint64 of each accepted completion and its prompt, whole.
      counts: numbers of accepted completions by treatment, by kind and name: see `Encoder.encode`.
      sampled: figures of every token, 0 for the prompts', float32 [tokens, figures]; empty if no row holds its ids.
    """

    reasons: list[str | None]
    tokens: np.ndarray
    prompt_lengths: np.ndarray
    completion_lengths: np.ndarray
    prompt_hashes: np.ndarray
    pair_hashes: np.ndarray
    counts: collections.Counter[tuple[str, str]]
    sampled: np.ndarray


# Everything below runs in the workers.

_Encoded = tuple[np.ndarray, np.ndarray, int, int]
"""Ids of the prompt and of the completion as they are stored, hash of the prompt, hash of both."""
_encoder: Any = None


def start_encoder(tokenizer: TokenizerInfo) -> None:
    """Prepares a worker for `encode_feedback`."""
    global _encoder
    quieten_transformers()
    _encoder = kept_encoder(tokenizer)


def encode_feedback(rows: Sequence[Feedback | Preference], limits: Limits) -> EncodedRows:
    """Encodes rows in a worker that was started with a tokenizer.

    Args:
      rows: what to encode.
      limits: of a row.

    Returns:
      The encoded rows, with the reasons of rejected ones.
    """
    reasons: list[str | None] = []
    accepted: list[_Encoded] = []
    sampled: list[np.ndarray] = []
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for row in rows:
        try:
            if completions_of(row)[0].sampled is not None:
                encoded, figures, counted = _sampled_record(_encoder, row, limits)
                sampled += figures
            else:
                encoded, counted = _encode_record(_encoder, row, limits)
            accepted += encoded
            counts.update(counted)
            reasons.append(None)
        except EncodingError as error:
            reasons.append(str(error))
    pieces = [piece for prompt, completion, _, _ in accepted for piece in (prompt, completion)]
    return EncodedRows(
        reasons,
        np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        np.array([len(row[0]) for row in accepted], np.int32),
        np.array([len(row[1]) for row in accepted], np.int32),
        np.array([row[2] for row in accepted], np.uint64),
        np.array([row[3] for row in accepted], np.uint64),
        counts,
        np.concatenate(sampled) if sampled else np.zeros((0, len(SAMPLED)), np.float32),
    )


def _encode_record(encoder: Encoder, record: Feedback | Preference, limits: Limits) -> tuple[list[_Encoded], Any]:
    """The completions of a record as they are stored, and counts."""
    completions = completions_of(record)
    encoded = encoder.encode(completions[0].prompt, [each.completion for each in completions])
    # Text that differs may be the same once the chat template has trimmed it.
    if len(completions) == 2 and np.array_equal(encoded.completions[0], encoded.completions[1]):
        raise EncodingError(SAME_COMPLETIONS)
    prompt, canonical = encoded.prompt, encoded.canonical
    stored = []
    for completion in encoded.completions:
        largest = max(prompt.max(initial=0), completion.max(initial=0))
        if largest >= limits.vocab_size:
            raise EncodingError(f"token {encoder.token(int(largest))!r} ({largest}) is outside the model's vocabulary")
        # Hashes are of whole texts, so that neither split nor pairing depends on truncation.
        prompt_hash = _hash(canonical)
        pair_hash = _hash(np.concatenate([[len(canonical)], canonical, completion]))
        if len(completion) > limits.max_length - 1:
            if limits.long_completion == "reject":
                raise EncodingError(
                    "completion longer than data.max_length; data.long_completion='cut' keeps its beginning"
                )
            # The completion is cut in any case, so the prompt keeps its share instead of a single token.
            kept = min(len(prompt), limits.max_prompt_length, limits.max_length // 2)
            completion = completion[: limits.max_length - kept]
        stored.append((cut_prompt(prompt, limits.max_length - 1, encoder.bos_id), completion, prompt_hash, pair_hash))
    if len(stored) == 2 and np.array_equal(stored[0][1], stored[1][1]):
        raise EncodingError(SAME_COMPLETIONS)  # The two are equal after truncation.
    return stored, encoded.counts


def _sampled_record(
    encoder: Encoder, record: Feedback | Preference, limits: Limits
) -> tuple[list[_Encoded], list[np.ndarray], Any]:
    """The completions of a record that holds their ids, the figures of all tokens, and counts. Nothing is cut."""
    stored: list[_Encoded] = []
    figures = []
    for row in completions_of(record):
        assert row.sampled is not None
        prompt, completion = row.sampled.prompt, row.sampled.completion
        largest = int(max(prompt.max(), completion.max()))
        if largest >= limits.vocab_size:
            raise EncodingError(f"token {encoder.token(largest)!r} ({largest}) is outside the model's vocabulary")
        if len(prompt) + len(completion) > limits.max_length:
            raise EncodingError("sampled tokens are more than data.max_length, and none may be cut")
        pair = np.concatenate([[len(prompt)], prompt, completion])
        stored.append((prompt, completion, _hash(prompt), _hash(pair)))
        figures.append(np.concatenate([np.zeros((len(prompt), len(SAMPLED)), np.float32), row.sampled.figures]))
    if len(stored) == 2 and stored[0][3] == stored[1][3]:
        raise EncodingError(SAME_COMPLETIONS)
    return stored, figures, {("rule", "sampled"): len(stored)}


def _hash(ids: np.ndarray) -> int:
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
