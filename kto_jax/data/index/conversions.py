"""Converts scores to thumbs, thumbs to pairs, and several completions of a prompt to one.

Pure functions of whole columns. Random choices depend only on the seed and a row's position, not on how the rows were
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kto_jax.config import DataConfig
from kto_jax.data.index.manifest import SPLITS
from kto_jax.data.permutation import noise
from kto_jax.data.rows.sources import Source

_ROUNDING = 1e-12
"""A score this close to a mean, relative to the largest score, is equal to it."""


def convert(
    columns: dict[str, np.ndarray], data: DataConfig, sources: Sequence[Source]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Computes what depends on all rows: labels of scores, which rows are used, and pairs.

    Args:
      columns: prompt_hashes, pair_hashes, splits, desirable, scores and sources (a position in `sources`), each [rows].
      data: seed, and whether one completion of each prompt is kept.
      sources: for each, the format of its rows and the rule that labels its scores.

    Returns:
      The columns desirable, splits (position of "unused" for rows that are not used) and rejected; and the manifest's
      entry on scores, with one item for each scale, if there are any.
    """
    hashes, splits = columns["prompt_hashes"], columns["splits"]
    formats = np.array([source.data.format for source in sources])
    desirable, used, facts = _label(columns, data, sources)
    if data.one_per_prompt:
        used = one_per_prompt(hashes, splits, used, data.seed)
    rejected = np.full(len(hashes), -1, np.int64)
    if "thumbs" in formats or "scores" in formats:
        rated = np.isin(formats, ("thumbs", "scores"))[columns["sources"]]
        rejected = match_pairs(hashes, splits, desirable, used & rated, data.seed)
        # A completion with both labels is not preferred over itself.
        texts = columns["pair_hashes"]
        rejected = np.where((rejected >= 0) & (texts == texts[rejected]), -1, rejected)
    if "pairs" in formats:
        rows = _rows_of(formats == "pairs", columns["sources"])
        own = own_pairs(used[rows])
        rejected[rows] = np.where(own < 0, -1, rows[own])
    splits = np.where(used, splits, SPLITS.index("unused")).astype(np.uint8)
    return {"desirable": desirable, "splits": splits, "rejected": rejected}, facts


def _label(
    columns: dict[str, np.ndarray], data: DataConfig, sources: Sequence[Source]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Which rows are desirable, which are used, and the manifest's entry on scores.

    Scores of one scale are labelled together. A source with its own rule or threshold is a scale; all other sources
    share one.
    """
    desirable, used = np.array(columns["desirable"]), np.ones(len(columns["desirable"]), bool)
    facts = []
    scored = [number for number, source in enumerate(sources) if source.data.format == "scores"]
    scales: dict[int | None, list[int]] = {}
    for number in scored:
        scales.setdefault(sources[number].scale, []).append(number)
    for numbers in scales.values():
        rows = _rows_of(np.isin(np.arange(len(sources)), numbers), columns["sources"])
        if not len(rows):
            continue
        scores, own = columns["scores"][rows], sources[numbers[0]].data
        desirable[rows], used[rows] = labels_from_scores(
            scores, columns["prompt_hashes"][rows], rule=own.score_rule, threshold=own.score_threshold, seed=own.seed
        )
        paths = list(dict.fromkeys(sources[number].path for number in numbers))
        facts.append({"sources": paths, **_describe(scores, used[rows], own)})
    return desirable, used, {"scores": facts} if facts else {}


def _rows_of(wanted: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Rows whose source is wanted, int64."""
    return np.flatnonzero(wanted[sources])


def labels_from_scores(
    scores: np.ndarray, prompt_hashes: np.ndarray, *, rule: str, threshold: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turns scores into thumbs (arXiv 2402.01306, section 4.2 and appendix).

        scores            1 2 3 6      of one prompt
        threshold 3       - - + +      at least the threshold
        mean (3)          - - . +      . is equal to it and unused
        median (2.5)      - - + +
        bernoulli         + with probability logistic(score)

    Args:
      scores: finite [rows].
      prompt_hashes: equal if the prompts are equal [rows].
      rule: a value of `DataConfig.score_rule`.
      threshold: of the rule "threshold".
      seed: of the rule "bernoulli".

    Returns:
      Which rows are desirable, and which are used at all, bool [rows].
    """
    scores = np.asarray(scores, np.float64)
    everything = np.ones(len(scores), bool)
    if rule == "threshold":
        return scores >= threshold, everything
    if rule == "bernoulli":
        # The 53 high bits give a uniform number in [0, 1).
        uniform = (noise(len(scores), (seed, 1)) >> np.uint64(11)) * 2.0**-53
        # logistic(score) without overflow.
        return uniform < 0.5 * (1 + np.tanh(scores / 2)), everything
    groups = _dense(prompt_hashes) if rule.startswith("prompt_") else np.zeros(len(scores), np.int64)
    pivots, largest = _pivots(scores, groups, rule.removeprefix("prompt_"))
    above = scores - pivots[groups]
    return above > 0, np.abs(above) > _ROUNDING * largest[groups]


def match_pairs(
    prompt_hashes: np.ndarray, splits: np.ndarray, desirable: np.ndarray, used: np.ndarray, seed: int
) -> np.ndarray:
    """Pairs desirable and undesirable completions of the same prompt and split at random, each at most once.

        prompt      a a a a b b
        desirable   + + - + + -
        rejected    . 2 . . 5 .      . is -1; which of the three + of prompt a gets row 2 is drawn

    Args:
      prompt_hashes: equal where the prompts are equal [rows].
      splits: only rows of equal split are paired [rows].
      desirable: thumbs-up [rows].
      used: rows that may be paired [rows].
      seed: of the random choice.

    Returns:
      For the chosen row of a pair the row of its rejected completion, -1 elsewhere, int64 [rows].
    """
    groups = _groups(prompt_hashes, splits)
    order = np.lexsort((noise(len(groups), (seed, 2)), groups))
    chosen, undesirable = order[(desirable & used)[order]], order[(~desirable & used)[order]]
    # Both lists are ordered by group. The k-th desirable row of a group takes the k-th undesirable one.
    rank = np.arange(len(chosen)) - np.searchsorted(groups[chosen], groups[chosen])
    partner = np.searchsorted(groups[undesirable], groups[chosen]) + rank
    has_partner = partner < np.searchsorted(groups[undesirable], groups[chosen], side="right")
    rejected = np.full(len(groups), -1, np.int64)
    rejected[chosen[has_partner]] = undesirable[partner[has_partner]]
    return rejected


def own_pairs(used: np.ndarray) -> np.ndarray:
    """The pairs of rows in format "pairs": 2k is chosen, 2k + 1 is its rejected completion.

    Args:
      used: a pair counts if both of its rows are used [rows].

    Returns:
      As `match_pairs`, int64 [rows].
    """
    rejected = np.full(len(used), -1, np.int64)
    rejected[::2] = np.where(used[::2] & used[1::2], np.arange(1, len(used), 2), -1)
    return rejected


def one_per_prompt(prompt_hashes: np.ndarray, splits: np.ndarray, used: np.ndarray, seed: int) -> np.ndarray:
    """Keeps one row of each prompt and split, chosen uniformly from its used rows.

    Args:
      prompt_hashes: equal where the prompts are equal [rows].
      splits: split of each row [rows].
      used: rows to choose from [rows].
      seed: of the random choice.

    Returns:
      Which rows are kept, bool [rows].
    """
    groups = _groups(prompt_hashes, splits)
    order = np.lexsort((noise(len(groups), (seed, 3)), groups))
    order = order[used[order]]
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.diff(groups[order]) > 0
    kept = np.zeros(len(groups), bool)
    kept[order[is_first]] = True
    return kept


def _describe(scores: np.ndarray, used: np.ndarray, data: DataConfig) -> dict[str, Any]:
    pivot = None
    if data.score_rule == "threshold":
        pivot = data.score_threshold
    elif data.score_rule in ("mean", "median"):
        pivot = float(_pivots(scores, np.zeros(len(scores), np.int64), data.score_rule)[0][0])
    figures = {"min": float(scores.min()), "mean": float(scores.mean()), "max": float(scores.max())}
    return {"rule": data.score_rule, "pivot": pivot, **figures, "unused": int(np.sum(~used))}


def _pivots(scores: np.ndarray, groups: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean or median of each group, and its largest absolute score [groups]."""
    order = np.lexsort((scores, groups))
    scores, counts = scores[order], np.bincount(groups)
    ends = np.cumsum(counts)
    starts = ends - counts
    largest = np.maximum(np.abs(scores[starts]), np.abs(scores[ends - 1]))
    if kind == "median":
        return (scores[starts + (counts - 1) // 2] + scores[starts + counts // 2]) / 2, largest
    return np.add.reduceat(scores, starts) / counts, largest


def _groups(prompt_hashes: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """A small integer for every prompt and split."""
    return _dense(prompt_hashes) * len(SPLITS) + splits


def _dense(values: np.ndarray) -> np.ndarray:
    """Numbers the distinct values from 0, int64."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
