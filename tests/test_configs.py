import ast
import runpy
from pathlib import Path

import pytest

from kto_jax.config import resolve
from kto_jax.objectives import check_objective

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves_and_says_how_it_is_run_and_on_what(path):
    config = resolve(runpy.run_path(str(path))["get_config"]())
    check_objective(config.objective)
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python -m kto_jax.train --config=configs/{path.name}" in docstring
    assert "machine" in docstring or "Hardware" in docstring
