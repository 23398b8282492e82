import os
import subprocess
import sys

import pytest

from kto_jax.devices.gpu_memory import SHARE, VARIABLES, use_most_gpu_memory
from tests import ROOT


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)


def test_most_of_the_memory_may_be_used(environment):
    use_most_gpu_memory()
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) == SHARE > 0.75


@pytest.mark.parametrize("name", VARIABLES)
def test_a_share_that_is_set_stays_and_is_the_only_one(name, environment, monkeypatch):
    monkeypatch.setenv(name, "0.5")
    use_most_gpu_memory()
    assert {variable: os.environ.get(variable) for variable in VARIABLES} == {**dict.fromkeys(VARIABLES), name: "0.5"}


@pytest.mark.parametrize(
    ("command", "flags"), [("train", ["--config.model.path=missing"]), ("plan", ["--topology=local"])]
)
def test_commands_set_it_before_they_use_a_device(command, flags, tmp_path):
    if command == "train":
        flags = [*flags, f"--workdir={tmp_path / 'run'}"]
    program = f"""
import importlib
from jax._src import xla_bridge
command = importlib.import_module("kto_jax.{command}")
command.use_most_gpu_memory = lambda: print("used:", xla_bridge.backends_are_initialized())
command.main(["--config=tiny", *{flags}])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "used: False" in ran.stdout, ran.stderr
