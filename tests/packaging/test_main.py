"""The kto-jax command."""

import subprocess
import sys

import pytest

from kto_jax.__main__ import COMMANDS, main
from tests import ROOT


def run(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "kto_jax", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_command_and_imports_no_jax():
    done = run("--help")
    assert done.returncode == 0 and all(f"  {name}" in done.stdout for name in COMMANDS)
    assert "kto_jax.config" in done.stderr and " jax\n" not in done.stderr


def test_every_command_is_a_module():
    assert all((ROOT / "kto_jax" / f"{name}.py").is_file() for name in COMMANDS)


@pytest.mark.parametrize(("given", "meant"), [("trian", "train"), ("inspct", "inspect"), ("generte", "generate")])
def test_a_misspelt_command_gets_the_nearest(capsys, given, meant):
    assert main([given]) == 2
    assert f"Did you mean {meant!r}?" in capsys.readouterr().err


def test_a_command_gets_its_flags():
    done = run("inspect", "--config=no_such_recipe")
    assert done.returncode == 2 and "no_such_recipe" in done.stderr
