"""The manifest of an index: its statistics, and the checks of the feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.detect import suggestion
from kto_jax.data.truncation import fit_lengths

SPLITS = ("train", "eval", "judge", "unused")


def statistics(columns: dict[str, np.ndarray], data: DataConfig) -> dict[str, Any]:
    """Statistics of the accepted rows for the manifest.

    Args:
      columns: prompt_lengths, completion_lengths, prompt_hashes, pair_hashes, desirable, splits and rejected, each
        [rows].
      data: the limits.

    Returns:
      Counts for each split and label, pairs of each split, unused rows, lengths in tokens, duplicates, contradictions
      and overlap.
    """
    splits, desirable, pairs = columns["splits"], columns["desirable"], columns["pair_hashes"]
    kept = fit_lengths(
        columns["prompt_lengths"],
        columns["completion_lengths"],
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
    )
    unique_pairs = _num_unique(pairs)
    unique_rows = _num_unique(pairs[desirable]) + _num_unique(pairs[~desirable])
    inside = [splits == code for code in range(len(SPLITS))]
    return {
        "splits": {
            name: {
                "desirable": int(np.sum(where & desirable)),
                "undesirable": int(np.sum(where & ~desirable)),
                "prompts": _num_unique(columns["prompt_hashes"][where]),
            }
            for name, where in zip(SPLITS, inside, strict=True)
        },
        "pairs": {
            name: int(np.sum(where & (columns["rejected"] >= 0))) for name, where in zip(SPLITS, inside, strict=True)
        },
        "unused": int(np.sum(inside[3])),
        "lengths": {
            "prompt": _percentiles(columns["prompt_lengths"]),
            "completion": _percentiles(columns["completion_lengths"]),
            "total": _percentiles(kept[0] + kept[1]),
        },
        "prompts_cut": int(np.sum(kept[0] < columns["prompt_lengths"])),
        "duplicates": len(pairs) - unique_rows,
        "contradictory": unique_rows - unique_pairs,
        "train_eval_overlap": _num_inside(pairs[inside[1]], pairs[inside[0] | inside[2]]),
    }


def by_source(columns: dict[str, np.ndarray], num_sources: int) -> list[dict[str, int]]:
    """Training data by source.

    Args:
      columns: sources (a number below `num_sources`), splits, desirable and rejected, each [rows].
      num_sources: number of sources.

    Returns:
      Numbers of desirable completions, undesirable completions and pairs of each.
    """
    train = columns["splits"] == SPLITS.index("train")
    kinds = {
        "desirable": train & columns["desirable"],
        "undesirable": train & ~columns["desirable"],
        "pairs": train & (columns["rejected"] >= 0),
    }
    counts = {name: np.bincount(columns["sources"][where], minlength=num_sources) for name, where in kinds.items()}
    return [{name: int(count[number]) for name, count in counts.items()} for number in range(num_sources)]


def with_weights(manifest: dict[str, Any], settings: dict[str, Any], weights: list[float]) -> dict[str, Any]:
    """The manifest with a run's weights of sources, on which the index itself does not depend.

    Args:
      manifest: of an index.
      settings: the run's data settings, as the manifest stores them.
      weights: of each of the manifest's sources.

    Returns:
      A copy in which each source has its weight and its share of an epoch's visits, for completions and for pairs.
    """
    sources = []
    counts = [source.get("train", {"desirable": 0, "undesirable": 0, "pairs": 0}) for source in manifest["sources"]]
    kinds = {
        "completions": [count["desirable"] + count["undesirable"] for count in counts],
        "pairs": [count["pairs"] for count in counts],
    }
    visits = {kind: np.array(numbers) * np.array(weights) for kind, numbers in kinds.items()}
    for i, source in enumerate(manifest["sources"]):
        share = {kind: round(float(each[i] / max(each.sum(), 1e-9)), 6) for kind, each in visits.items()}
        sources.append({**source, "weight": weights[i], "share": share})
    return {**manifest, "data": settings, "sources": sources}


def weights_of(manifest: Mapping[str, Any]) -> np.ndarray:
    """Visits of each row of each source per epoch, float64 [sources]."""
    return np.array([source.get("weight", 1.0) for source in manifest.get("sources", ())])


def _num_unique(values: np.ndarray) -> int:
    # One sorted copy: np.unique makes several, and there may be ten million rows.
    ordered = np.sort(values)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + min(len(ordered), 1)


def _num_inside(values: np.ndarray, others: np.ndarray) -> int:
    """Number of `values` that are also among `others`."""
    if not len(values) or not len(others):
        return 0
    ordered = np.sort(others)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return int(np.count_nonzero(ordered[at] == values))


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    percents = (10, 50, 90, 99)
    points = {f"p{p}": float(value) for p, value in zip(percents, np.percentile(lengths, percents), strict=True)}
    return {"min": float(lengths.min()), **points, "max": float(lengths.max()), "mean": round(float(lengths.mean()), 2)}


def _left(manifest: dict[str, Any], counts: dict[str, int]) -> str:
    """Sentences on the rows that are neither rejected nor trained on."""
    skips = ", ".join(f"{n} × {reason}" for reason, n in list(manifest.get("skips", {}).items())[:10])
    held_out = counts.get("eval", 0) + counts.get("judge", 0)
    said = [
        f"Skipped: {skips}. " if skips else "",
        f"{counts['unused']} are left out by data.score_rule or data.one_per_prompt. " if counts.get("unused") else "",
        f"{held_out} are held out. " if held_out else "",
    ]
    return "".join(said)


def _fits(manifest: dict[str, Any]) -> str:
    """Sentences on the settings that would fit the files."""
    fitting = [(source["name"], [tuple(fit) for fit in source.get("fits", ())]) for source in manifest["sources"]]
    return "".join(f"{name} fits {suggestion(fits)}. " for name, fits in fitting[:3] if fits)


def check(manifest: dict[str, Any], data: DataConfig) -> None:
    """Refuses feedback that must not be trained on.

    Args:
      manifest: counts, rejections and statistics.
      data: the limits.

    Raises:
      ConfigError: no row is usable, too many are rejected, or a held-out row is trained on.
    """
    rows, rejected = manifest["rows"], manifest["rejected"]
    histogram = ", ".join(f"{n} × {reason}" for reason, n in list(manifest["rejections"]["histogram"].items())[:10])
    first = "; ".join(f"{r['place']}: {r['reason']}" for r in manifest["rejections"]["first"][:5])
    why = f"Rejected: {histogram}. First: {first}. " if rejected else ""
    counts = {name: split["desirable"] + split["undesirable"] for name, split in manifest.get("splits", {}).items()}
    if not counts.get("train"):
        raise ConfigError(
            f"0 of {rows} rows usable to train on. {why}{_left(manifest, counts)}At least one is needed. "
            f"{_fits(manifest)}Correct the rows, or set the fields, label_map, holdout and max_length of "
            "config.data to fit them."
        )
    if rejected > data.max_rejected * rows:
        raise ConfigError(
            f"{rejected} of {rows} rows are rejected ({rejected / rows:.2%}). {why}"
            f"At most data.max_rejected={data.max_rejected:.2%} may be. "
            "Correct the rows, or set config.data.max_rejected."
        )
    if manifest["train_eval_overlap"]:
        raise ConfigError(
            f"{manifest['train_eval_overlap']} rows of data.eval have a prompt and completion that are also in "
            "data.train. Held-out rows must not be trained on. Remove them from one of the two."
        )
