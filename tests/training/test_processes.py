"""Training in several real processes on loopback: the same numbers as in one, and all of them end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from kto_jax.train import main
from tests import COMPILER_FLAGS, ROOT, SAME_PROGRAMS

STEPS = 6
DEVICES = 4
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SHORT = ["--config=configs/tiny.py", f"--config.max_steps={STEPS}", *SAME_PROGRAMS, "--config.data.chat_template=none",
         "--config.checkpoint.every=2", "--config.processes.timeout_seconds=20"]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(cache, workdir, count, *arguments, of_second=None, devices=0, arguments_of_second=(), program_of_second=()):
    """Starts `count` processes with the given number of fake devices each, or sharing DEVICES."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    compiler = f"{COMPILER_FLAGS} --xla_force_host_platform_device_count={devices or DEVICES // count}"
    environment = os.environ | {"KTO_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler}
    program, flags = ("-m", "kto_jax.train"), [*SHORT, f"--workdir={workdir}", *arguments]
    processes = []
    for number in range(count):
        own = dict(zip(NAMES, (address, str(count), str(number)), strict=True)) if count > 1 else {}
        own |= of_second if of_second and number == 1 else {}
        own_arguments, own_program = (
            (arguments_of_second, program_of_second or program) if number == 1 else ((), program)
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, *own_program, *flags, *own_arguments],
                cwd=ROOT,
                env=environment | own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes):
    """Exit codes and messages."""
    try:
        messages = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], messages


def train_alone(cache, workdir, *arguments):
    """Trains in this process, on all 8 devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(cache))
        assert main([*SHORT, f"--workdir={workdir}", *arguments]) == 0
    return rows(workdir)


def train(cache, workdir, count, *arguments):
    codes, messages = finish(start(cache, workdir, count, *arguments))
    assert codes == [0] * count, "\n".join(messages)
    return rows(workdir)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def policy(workdir):
    return safetensors.numpy.load_file(workdir / "policy" / "model.safetensors")


def assert_same(found, wanted):
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        names = ("loss", "z0", "grad_norm", "margin", "tokens", "eval_loss", "eval_auc", "eval_z0")
        assert [name in one for name in names] == [name in other for name in names]
        for name in set(names) & other.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (one["step"], name)


def assert_same_policy(found, wanted):
    before, after = policy(wanted), policy(found)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert max(row["z0"] for row in train_alone(cache, workdir)) > 0.5
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone, cache, tmp_path):
    assert_same(train(cache, tmp_path / "run", 2), rows(alone))
    assert_same_policy(tmp_path / "run", alone)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.exhaustive
def test_four_processes_over_a_mixed_mesh_train_alike(alone, cache, tmp_path):
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]  # every mesh: test_mesh_steps.py
    assert_same(train(cache, tmp_path / "run", 4, *mesh), rows(alone))
    assert_same_policy(tmp_path / "run", alone)


@pytest.mark.exhaustive
def test_two_processes_train_from_precomputed_reference_logps(alone, cache, tmp_path):
    log = train(cache, tmp_path / "run", 2, "--config.reference.precompute=True")
    assert_same(log, rows(alone))


@pytest.mark.nightly
def test_two_processes_train_adapters_as_one_does_and_write_them_out(cache, tmp_path):
    adapters = ["--config.lora.rank=4", "--config.optimizer.learning_rate=1e-2", "--config.reference.param_dtype=int8"]
    adapters += ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.samples.num_prompts=2"]
    adapters += ["--config.data.chat_template=auto"]
    log = train_alone(cache, tmp_path / "one", *adapters, "--config.samples.max_new_tokens=3")
    assert max(row["z0"] for row in log) > 0.1
    assert_same(train(cache, tmp_path / "two", 2, *adapters, "--config.samples.max_new_tokens=3"), log)
    assert_same_policy(tmp_path / "two", tmp_path / "one")
    completions = [json.loads((tmp_path / run / "samples_after.json").read_text()) for run in ("one", "two")]
    assert [len(found["completions"]) for found in completions] == [2, 2]
    one, two = (
        safetensors.numpy.load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two")
    )
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=1e-5)


@pytest.mark.nightly
def test_a_run_is_resumed_with_another_number_of_processes(alone, cache, tmp_path):
    workdir = tmp_path / "run"
    # A save after every step, so that the run does not end before it handles the signal.
    processes = start(cache, workdir, 2, "--config.checkpoint.every=1")
    wait_for_step(workdir, 1, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, messages = finish(processes)
    assert codes == [75, 75], "\n".join(messages)
    assert len(rows(workdir)) < STEPS
    assert_same(train(cache, workdir, 4, "--config.mesh.fsdp=2"), rows(alone))
    assert_same_policy(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "ends"), [
    (1, [75]),  # Gloo's error reaches Python.
    # Its devices deadlock; JAX's heartbeat aborts it.
    pytest.param(2, [75, -signal.SIGABRT], marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_after_a_process_is_killed_the_other_exits_for_a_restart_and_the_run_resumes_alone(
    devices, ends, alone, cache, tmp_path
):
    workdir = tmp_path / "run"
    processes = start(cache, workdir, 2, devices=devices)
    wait_for_step(workdir, 3, processes)
    processes[1].kill()
    killed = time.monotonic()
    codes, messages = finish(processes)
    # The other process waits 5 s for an answer; the rest is margin for a busy machine.
    assert time.monotonic() - killed < 100
    assert codes[0] in ends and codes[1] == -9, messages[0]
    assert codes[0] != 75 or "process 1 of 2 is lost" in " ".join(messages[0].split())
    assert_same(train_alone(cache, workdir), rows(alone))
    assert_same_policy(workdir, alone)


HANG = """
import runpy, threading
from kto_jax.training import in_flight

dispatch = in_flight.StepsInFlight.dispatch


def wait_for_ever():
    threading.Event().wait()


def hang(self, step, *arguments):
    if step == 5:
        wait_for_ever()
    return dispatch(self, step, *arguments)


in_flight.StepsInFlight.dispatch = hang
runpy.run_module("kto_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.nightly
def test_if_one_process_hangs_all_print_their_stacks_and_end_for_a_restart(cache, tmp_path):
    watch = ["--config.watch.stall_factor=1", "--config.watch.stall_seconds=2", "--config.watch.stall_exit=True"]
    processes = start(cache, tmp_path / "run", 2, *watch, program_of_second=("-c", HANG))
    codes, messages = finish(processes)
    assert codes == [75, 75], "\n".join(messages)
    for number, message in enumerate(messages):
        assert f"warning: process {number} has completed no step for" in message
        assert "in take_steps" in message
    assert "in wait_for_ever" in messages[1] and "in wait_for_ever" not in messages[0]


@pytest.mark.slow
def test_a_refusal_of_one_process_ends_all(cache, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    codes, messages = finish(start(cache, tmp_path / "run", 2))
    assert codes == [2, 2], "\n".join(messages)
    assert all("holds files but no run" in message for message in messages)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_processes_with_other_feedback_are_refused(cache, tmp_path):
    lines = (ROOT / "configs" / "tiny_feedback.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "changed.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")
    other = [f"--config.data.train={tmp_path / 'changed.jsonl'}"]
    codes, messages = finish(start(cache, tmp_path / "run", 2, arguments_of_second=other))
    assert codes == [2, 2], "\n".join(messages)
    for message in messages:
        assert "the feedback (config.data.train, config.data.eval) is" in " ".join(message.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_failure_of_one_process_ends_the_others_too(cache, tmp_path):
    broken = tmp_path / "no folder"
    broken.write_text("a file")
    processes = start(cache, tmp_path / "run", 2, of_second={"KTO_JAX_CACHE": str(broken)})
    codes, messages = finish(processes)
    assert codes[0] == 2, messages[0]
    assert "process 1 of 2 has failed" in " ".join(messages[0].split())
    assert codes[1] in (1, 2)
    assert "no folder" in messages[1]


TALK = """
import sys, time
from kto_jax.devices import processes
from kto_jax.config import ProcessesConfig
processes.join(ProcessesConfig(timeout_seconds=5))
time.sleep(0 if processes.is_first() else 15)
print(processes.exchange_text(f"word {sys.argv[1]}"), processes.broadcast_bool(processes.is_first()))
"""


@pytest.mark.slow
def test_processes_wait_for_each_other_longer_than_the_heartbeat_timeout():
    outputs = [process.communicate(timeout=100) for process in start_script(TALK)]
    assert [said for said, _ in outputs] == ["['word 0', 'word 1'] True\n"] * 2, outputs


def start_script(script):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | dict(zip(NAMES, (address, "2", str(number)), strict=True)),
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_folder_that_the_others_do_not_see_ends_all(cache, tmp_path):
    # As on two hosts with their own disks: one relative path, two folders.
    processes = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    for number in range(2):
        environment = os.environ | {
            "KTO_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
            **dict(zip(NAMES, (address, "2", str(number)), strict=True)),
        }  # fmt: skip
        command = [sys.executable, "-m", "kto_jax.train", f"--config={ROOT}/configs/tiny.py", *SHORT[1:],
                   f"--workdir={tmp_path / str(number)}", "--config.processes.timeout_seconds=10"]  # fmt: skip
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    codes, messages = finish(processes)
    assert codes == [75, 75], "\n".join(messages)
    assert "this process has not seen it for 10 s" in " ".join(messages[1].split())
    assert "process 1 of 2 has failed" in " ".join(messages[0].split())


@pytest.mark.parametrize("variables, arguments, why", [
    ({"JAX_NUM_PROCESSES": "2"}, [], "lacks JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
    (dict(zip(NAMES, ("127.0.0.1:1", "two", "0"), strict=True)), [], "lacks nothing"),
    ({}, ["--config.processes.count=2"], "1 processes were started, and config.processes.count=2"),
], ids=["missing", "no number", "count"])  # fmt: skip
def test_processes_that_cannot_connect_are_refused(tmp_path, monkeypatch, capsys, variables, arguments, why):
    monkeypatch.chdir(ROOT)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([*SHORT, f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_process_whose_first_process_is_missing_is_told_so_and_may_start_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"127.0.0.1:{server.getsockname()[1]}"
    for name, value in zip(NAMES, (free, "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert main([*SHORT, f"--workdir={tmp_path / 'run'}", "--config.processes.timeout_seconds=1"]) == 75
    assert f"does not answer at JAX_COORDINATOR_ADDRESS={free}" in " ".join(capsys.readouterr().err.split())


def wait_for_step(workdir, step, processes):
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(finish(processes))
