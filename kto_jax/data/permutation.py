"""Stateless, seeded randomness by position: a permutation without shuffling a list, and random bits."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 4


def permute(positions: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """The images of `positions` under a pseudorandom permutation of 0 … size - 1.

    A Feistel network (Luby & Rackoff 1988) permutes the smallest 4^k ≥ size. An image outside the range is permuted
    again until it is inside (cycle walking, Black & Rogaway 2002), on average less than four times.

    Args:
      positions: integers in [0, size).
      size: length of the permutation, at least 1.
      key: integers that select the permutation, for example (seed, epoch).

    Returns:
      int64, of the shape of `positions`; distinct positions give distinct results.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    round_keys = _keys(key, _ROUNDS)
    result = _feistel(np.asarray(positions, np.uint64), half, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, round_keys)
    return result.astype(np.int64)


def noise(count: int, key: tuple[int, ...]) -> np.ndarray:
    """Random bits for the positions 0 … count - 1, by SplitMix64 (Steele, Lea & Flood 2014).

    Args:
      count: number of positions.
      key: integers that select the sequence.

    Returns:
      uint64 [count]; position i has the same bits whatever the count.
    """
    return _mix(_keys(key, 1) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _keys(key: tuple[int, ...], count: int) -> np.ndarray:
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8")


def _feistel(values: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
