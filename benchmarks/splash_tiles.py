"""Tiles of scores that splash attention computes for packed rows on TPU, with and without the schedule of segments.

    python -m benchmarks.splash_tiles

Rows are filled with examples of log-normal length (`benchmarks.attention.pack`). A tile is a block of queries by a
block of keys, for one head. JAX's own schedule for the causal mask computes the lower triangle; the schedule derived
from the segments computes only tiles that hold a visible key. Counts, not times: no TPU is needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.attention import pack
from kto_jax.models.attention.splash import block_and_length, segment_starts, tile_schedule

LENGTHS, BLOCKS, ROWS = (2048, 8192), (512, 256, 128), 100


def count(length: int, block: int) -> dict[str, float]:
    """Mean tiles per row and head, and the share of their scores that some query sees."""
    segments = np.concatenate([pack(length, seed)[0] for seed in range(ROWS)])
    starts = segment_starts(segments)
    computed = int(np.sum(tile_schedule(starts, block, None).key_tiles_needed)) / ROWS
    tiles = length // block
    visible = float(np.sum(np.arange(segments.size).reshape(segments.shape) - np.asarray(starts) + 1)) / ROWS
    causal = tiles * (tiles + 1) // 2
    return {
        "length": length,
        "block": block,
        "causal": causal,
        "with_segments": computed,
        "share": computed / causal,
        "scores_used": visible / (computed * block**2),
    }


def main() -> None:
    """Prints a row per length and block, and writes them to benchmarks/results/splash_tiles.json."""
    rows = [count(length, block) for length in LENGTHS for block in BLOCKS]
    print("tokens  block  causal  with segments  share  scores used")
    for row in rows:
        chosen = "*" if row["block"] == block_and_length(int(row["length"]))[0] else " "
        print(
            f"{row['length']:6}  {row['block']:4}{chosen} {row['causal']:7}  {row['with_segments']:13.1f}  "
            f"{row['share']:5.1%}  {row['scores_used']:11.1%}"
        )
    path = Path(__file__).parent / "results" / "splash_tiles.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
