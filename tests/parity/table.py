"""The largest differences from transformers for every family: `python -m tests.parity.table` prints them as a table.

Logits: |ours - theirs| / (1 + |theirs|). Gradients: of each tensor, as a share of its largest. Models are random, tiny,
and float32; each comes from a config.json of tests/models/families/family_files.py.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

COLUMNS = ("dense", "packed", "decoded", "gradient", "exported")


def main(names: list[str]) -> None:
    """Prints a row for each family, or for those that are named."""
    import torch
    import transformers

    from tests.parity.pairs import ALL_FILES, Pair

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"| config | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    worst = dict.fromkeys(COLUMNS, 0.0)
    for name in names or ALL_FILES:
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(torch, transformers, name, Path(folder))
            found = {column: getattr(pair, f"{column}_difference")() for column in COLUMNS}
        worst = {column: max(worst[column], found[column]) for column in COLUMNS}
        print(f"| {name} | {' | '.join(f'{found[column]:.1e}' for column in COLUMNS)} |", flush=True)
    print(f"| largest | {' | '.join(f'{worst[column]:.1e}' for column in COLUMNS)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
