import ast

import pytest

from tests.golden.dump_configs import CONFIGS, GOLDEN, dump


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves_to_its_golden_dump(path):
    assert dump(path) == (GOLDEN / f"{path.stem}.json").read_text(), "run python -m tests.golden.dump_configs and look"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_how_it_is_run_on_what_and_what_to_expect(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    online = path.stem.startswith("online_") or path.stem in ("grpo_llama", "ppo_llama", "rloo_llama")
    command = "online" if online else "train"
    assert f"python -m kto_jax.{command} --config=configs/{path.name}" in docstring
    assert "machine" in docstring or "Hardware" in docstring
    assert "Expect" in docstring


def test_every_dump_belongs_to_a_config():
    assert {path.stem for path in GOLDEN.iterdir()} == {path.stem for path in CONFIGS}
