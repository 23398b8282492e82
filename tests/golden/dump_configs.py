"""Writes what every config of configs/ resolves to: `python -m tests.golden.dump_configs`.

A default that changes then shows as a difference in tests/golden/configs/.
"""

import json
import runpy
from pathlib import Path

from kto_jax.config import resolve, to_dict
from kto_jax.objectives import make_objective
from tests import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = Path(__file__).parent / "configs"


def dump(path: Path) -> str:
    """A config, resolved, and the options of its objective (with as many desirable rows as undesirable ones)."""
    config = resolve(runpy.run_path(str(path))["get_config"]())
    objective = make_objective(config.objective, num_desirable=100, num_undesirable=100)
    values = to_dict(config) | {"resolved_objective": {"name": config.objective.name, **objective.options}}
    return json.dumps(values, indent=1).replace(str(ROOT), "ROOT") + "\n"


if __name__ == "__main__":
    for path in CONFIGS:
        (GOLDEN / f"{path.stem}.json").write_text(dump(path))
