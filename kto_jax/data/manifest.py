"""What is said about an index: its figures, and the refusal of feedback that must not be trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.truncation import fit_lengths

SPLITS = ("train", "eval", "judge", "unused")


def statistics(columns: dict[str, np.ndarray], data: DataConfig) -> dict[str, Any]:
    """What the manifest says of the accepted rows.

    Args:
      columns: prompt_lengths, completion_lengths, prompt_hashes, pair_hashes, desirable and splits, each [rows].
      data: the limits.

    Returns:
      Counts for each split and label, lengths in tokens, duplicates, contradictions and overlap.
    """
    splits, desirable, pairs = columns["splits"], columns["desirable"], columns["pair_hashes"]
    kept = fit_lengths(
        columns["prompt_lengths"],
        columns["completion_lengths"],
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
    )
    unique_pairs = len(np.unique(pairs))
    unique_rows = len(np.unique(np.stack([pairs, desirable.astype(np.uint64)]), axis=1).T)
    inside = [splits == code for code in range(len(SPLITS))]
    return {
        "splits": {
            name: {
                "desirable": int(np.sum(where & desirable)),
                "undesirable": int(np.sum(where & ~desirable)),
                "prompts": len(np.unique(columns["prompt_hashes"][where])),
            }
            for name, where in zip(SPLITS, inside, strict=True)
        },
        "lengths": {
            "prompt": _percentiles(columns["prompt_lengths"]),
            "completion": _percentiles(columns["completion_lengths"]),
            "total": _percentiles(kept[0] + kept[1]),
        },
        "prompts_cut": int(np.sum(kept[0] < columns["prompt_lengths"])),
        "duplicates": len(pairs) - unique_rows,
        "contradictory": unique_rows - unique_pairs,
        "train_eval_overlap": int(np.isin(pairs[inside[1]], pairs[~inside[1]]).sum()),
    }


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    points = {f"p{p}": float(np.percentile(lengths, p)) for p in (10, 50, 90, 99)}
    return {"min": float(lengths.min()), **points, "max": float(lengths.max()), "mean": round(float(lengths.mean()), 2)}


def check(manifest: dict[str, Any], data: DataConfig) -> None:
    """Refuses rows that must not be trained on.

    Args:
      manifest: counts, rejections and statistics.
      data: the limits.

    Raises:
      ConfigError: no row is usable, too many are rejected, one label is missing, or a held-out row is trained on.
    """
    rows, rejected = manifest["rows"], manifest["rejected"]
    histogram = ", ".join(f"{n} × {reason}" for reason, n in list(manifest["rejections"]["histogram"].items())[:10])
    first = "; ".join(f"{r['place']}: {r['reason']}" for r in manifest["rejections"]["first"][:5])
    why = f"Rejected: {histogram}. First: {first}. " if rejected else ""
    trained = manifest.get("splits", {}).get("train", {"desirable": 0, "undesirable": 0})
    if not trained["desirable"] + trained["undesirable"]:
        left = f"{manifest['skipped']} are left out by data.label_map, {manifest['accepted']} are held out. "
        raise ConfigError(
            f"0 of {rows} rows usable to train on. {why}{left}At least one is needed. "
            "Mend the rows, or set the fields, label_map, holdout and max_length of config.data to fit them."
        )
    if rejected > data.max_rejected * rows:
        raise ConfigError(
            f"{rejected} of {rows} rows are rejected ({rejected / rows:.2%}). {why}"
            f"At most data.max_rejected={data.max_rejected:.2%} may be. Mend the rows, or set config.data.max_rejected."
        )
    if not trained["desirable"] or not trained["undesirable"]:
        only = "desirable" if trained["desirable"] else "undesirable"
        raise ConfigError(
            f"all {trained[only]} rows to train on are {only}. KTO needs both labels. "
            "Check config.data.label_field and label_map."
        )
    if manifest["train_eval_overlap"]:
        raise ConfigError(
            f"{manifest['train_eval_overlap']} rows of data.eval have a prompt and completion that are also in "
            "data.train. Held-out rows must not be trained on. Remove them from one of the two."
        )
