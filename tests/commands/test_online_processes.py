"""Online rounds in two processes on loopback, and on another number of devices than they began on."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import COMPILER_FLAGS, ROOT
from tests.commands.test_online import EPOCHS, flags, policy, read  # noqa: F401 (a fixture)

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def run(count, *arguments, devices=4, module="kto_jax.online", exit_code=0):
    """Runs the command in `count` processes that share fake devices."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    device_flags = f"{COMPILER_FLAGS} --xla_force_host_platform_device_count={devices // count}"
    command = [sys.executable, "-m", *module.split(), *arguments]
    started = []
    for number in range(count):
        own = dict(zip(NAMES, (address, str(count), str(number)), strict=True)) if count > 1 else {}
        environment = os.environ | {"XLA_FLAGS": device_flags} | own
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        messages = [process.communicate()[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [exit_code] * count, "\n".join(messages)


@pytest.mark.nightly
@pytest.mark.parametrize("name, where", [pytest.param("grpo", "first", marks=pytest.mark.exhaustive), ("ppo", "mesh")])
def test_two_processes_sample_score_and_train_as_one_does(flags, tmp_path, name, where):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*flags, *EPOCHS, f"--config.objective.name={name}", f"--sample_on={where}", "--rounds=2", "--keep=2"]
    for count, folder in ((1, one), (2, two)):
        run(count, *arguments, f"--workdir={folder}")
    first, second = (read(folder / "round_000" / "rollout.jsonl") for folder in (one, two))
    for own, other in zip(first, second, strict=True):
        np.testing.assert_allclose(own.pop("logps"), other.pop("logps"), atol=0 if where == "first" else 1e-5)
    assert first == second, "tokens and rewards"
    for number in range(2):
        for key, values in policy(one, number).items():
            np.testing.assert_allclose(policy(two, number)[key], values, atol=1e-5)
    tokens = [[row["completion_ids"] for row in read(folder / "round_001" / "rollout.jsonl")] for folder in (one, two)]
    assert tokens[0] == tokens[1]
    assert len(read(two / "rounds.jsonl")) == 2


@pytest.mark.nightly
def test_a_run_that_is_resumed_on_other_devices_differs_by_rounding(flags, tmp_path):  # noqa: F811
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    settings = ["--config.objective.name=ppo", "--config.checkpoint.every=1", "--rounds=3", "--keep=3"]
    run(1, *flags, *EPOCHS, *settings, f"--workdir={whole}")
    killed = "tests.commands.killed_online epochs"
    run(1, *flags, *EPOCHS, *settings, f"--workdir={moved}", module=killed, exit_code=-signal.SIGKILL)
    assert (moved / "round_001" / "run" / "checkpoints" / "5").exists()
    run(1, *flags, *EPOCHS, *settings, f"--workdir={moved}", devices=2)

    # What the first devices had done is kept; tokens and labels of later rounds are the same too.
    assert read(moved / "round_001" / "feedback.jsonl") == read(whole / "round_001" / "feedback.jsonl")
    tokens = [
        [row["completion_ids"] for row in read(folder / "round_002" / "rollout.jsonl")] for folder in (whole, moved)
    ]
    assert tokens[0] == tokens[1]
    for number in (0, 1, 2):
        for key, values in policy(whole, number).items():
            np.testing.assert_allclose(policy(moved, number)[key], values, atol=1e-5 if number else 0)
