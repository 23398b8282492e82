"""launch/gpu.sh: one process for the GPUs of a node."""

import signal

import pytest

from tests.launch.machine import ends_with, python


def test_gpu_restarts_a_preempted_command_until_it_finishes(machine):
    code, _, err = machine.run("gpu.sh", "--", *ends_with(75, 134, 0))
    assert code == 0 and len(machine.lines("ran")) == 3
    assert "restart 1 of at most 20" in err and "restart 2 of at most 20" in err


@pytest.mark.parametrize("code", [0, 1, 2, 127, 130, 137])
def test_gpu_restarts_after_no_other_exit_code(machine, code):
    assert machine.run("gpu.sh", "--", *ends_with(code))[0] == code
    assert len(machine.lines("ran")) == 1


def test_gpu_gives_up_after_the_maximum_number_of_restarts_in_a_row(machine):
    code, _, err = machine.run("gpu.sh", "--", *ends_with(75), KTO_MAX_RESTARTS="2")
    assert code == 75 and len(machine.lines("ran")) == 3
    assert "after 2 restarts in a row" in err


def test_restarts_are_counted_from_0_after_a_long_run(machine):
    command = ["bash", "-c", f"sleep 1.1; {ends_with(75, 75, 0)[2]}"]
    assert machine.run("gpu.sh", "--", *command, KTO_MAX_RESTARTS="1", KTO_RESET_SECONDS="1")[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_gpu_forwards_a_signal_and_does_not_restart_after_it(machine, number, code):
    text = f"""
def leave(number, frame):
    time.sleep(0.2)
    sys.exit({code})
signal.signal({number:d}, leave)
print("ready", file=open("ready", "a"))
time.sleep(600)
"""
    process = machine.start("gpu.sh", "--", *python(text))
    machine.wait_for("ready", 1)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code and len(machine.lines("ready")) == 1


def test_gpu_passes_secrets_to_docker_by_name(machine):
    (machine.folder / "docker.codes").write_text("75 0")
    code, _, _ = machine.run("gpu.sh", "--", "python", "train", KTO_IMAGE="kto_jax:cuda")
    first, second = machine.calls("docker")
    assert code == 0 and first == second
    assert first["argv"][-3:] == ["kto_jax:cuda", "python", "train"]
    assert "--env=HF_TOKEN" in first["argv"] and "--env=WANDB_API_KEY" not in first["argv"]
    assert f"--volume={machine.folder}/runs:/runs" in first["argv"]
    assert "HF_TOKEN" in first["environment"]
