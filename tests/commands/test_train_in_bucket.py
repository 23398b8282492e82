"""Runs whose folder is in a bucket: real processes that are killed, on the tiny model, and a server on this machine."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import transformers

from kto_jax import export, generate
from kto_jax.storage.bucket import Bucket
from kto_jax.train import main
from tests import COMPILER_FLAGS, ROOT
from tests.commands.test_train import TINY
from tests.fake_buckets import environment, make_bucket, serve_gcs

TIMED = ("seconds", "wait_seconds", "compile_seconds", "tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gcs():
    return make_bucket("runs")


@pytest.fixture(scope="module")
def s3():
    return make_bucket("runs", "s3")


@pytest.fixture
def run(gcs, request):
    return Bucket(f"{gcs}/{request.node.name.replace('[', '-').strip(']')}")


@pytest.fixture
def run_in(gcs, s3):
    return lambda kind: Bucket(f"{kind}://runs/killed")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, cache):
    """The folder of a run on a disk that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(cache))
        assert main([*TINY, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(autouse=True)
def here(monkeypatch, cache):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))


def start(run, tmp_path, *arguments, program=("-m", "kto_jax.train"), **settings):
    """Starts the run in a process that has nothing of its own but empty folders."""
    folders = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR", "KTO_JAX_CACHE")}
    for folder in folders.values():
        os.makedirs(folder, exist_ok=True)
    if not (tmp_path / "TMPDIR/configs").exists():
        (tmp_path / "TMPDIR/configs").symlink_to(ROOT / "configs")
    environment = os.environ | folders | {"PYTHONPATH": str(ROOT)} | settings
    return subprocess.Popen(
        [sys.executable, *program, *TINY, f"--workdir={run.url}", *arguments],
        cwd=folders["TMPDIR"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(run, process):
    """Waits until a first checkpoint is being written."""
    while process.poll() is None:
        if run.versions("checkpoints/3/"):
            return
    raise AssertionError(process.communicate()[1])


def figures(text):
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMED} for line in text.splitlines()
    ]


def assert_equal_to_the_run_on_disk(run, on_disk):
    assert figures(run.read("metrics.jsonl").decode()) == figures((on_disk / "metrics.jsonl").read_text())
    assert run.read("policy/model.safetensors") == (on_disk / "policy/model.safetensors").read_bytes()
    in_bucket = {name.split("/")[0] for name in run.versions()} - {".lease"}
    assert in_bucket == {path.name for path in on_disk.iterdir()} - {".lock"}
    steps = {name.split("/")[1] for name in run.versions("checkpoints/")}
    assert steps == {path.name for path in (on_disk / "checkpoints").iterdir()}


@pytest.mark.parametrize("kind", ["gs", "s3"])
@pytest.mark.nightly
def test_a_run_in_a_bucket_is_killed_and_resumed_elsewhere_and_equals_one_on_a_disk(
    kind, run_in, on_disk, tmp_path, capsys
):
    run = run_in(kind)
    process = start(run, tmp_path)
    wait_for_checkpoint(run, process)
    process.kill()
    process.communicate()
    assert main([*TINY, f"--workdir={run.url}"]) == 0
    assert f"see {run.url}/report.html and {run.url}/policy" in capsys.readouterr().err
    assert_equal_to_the_run_on_disk(run, on_disk)
    assert main([*TINY, f"--workdir={run.url}", "--config.seed=9"]) == 2
    assert f"--workdir={run.url} holds another run (config.seed: was 0, is 9)" in capsys.readouterr().err

    assert generate.main([f"--model={run.url}", "--prompt=Hello", "--max_new_tokens=2"]) == 0
    assert "2 tokens in" in capsys.readouterr().out
    assert export.main([f"--run={run.url}"]) == 2
    assert "Set --to." in capsys.readouterr().err
    assert export.main([f"--run={run.url}", f"--to={tmp_path}/out"]) == 0
    exported = (tmp_path / "out/model.safetensors").read_bytes()
    assert exported == (on_disk / "policy/model.safetensors").read_bytes()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kills", [1, 20])
def test_no_kill_at_any_moment_loses_a_run_in_a_bucket(kills, run, on_disk, tmp_path):
    moments = random.Random(kills)
    for _ in range(kills):
        process = start(run, tmp_path, "--config.checkpoint.every=1")
        started = time.monotonic()
        moment = moments.uniform(2, 20)
        while process.poll() is None and time.monotonic() - started < moment:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    process = start(run, tmp_path, "--config.checkpoint.every=1")
    message = process.communicate()[1]
    assert process.returncode == 0, message
    assert figures(run.read("metrics.jsonl").decode()) == figures((on_disk / "metrics.jsonl").read_text())
    assert run.read("policy/model.safetensors") == (on_disk / "policy/model.safetensors").read_bytes()


@pytest.mark.exhaustive
def test_a_bucket_that_is_away_is_reported_and_waited_for(on_disk, tmp_path):
    server, url = serve_gcs(tmp_path / "server")
    (tmp_path / "server/runs").mkdir()
    arguments = ["--config.checkpoint.every=1"]
    process = start(Bucket("gs://runs/mine"), tmp_path, *arguments, **environment(url))
    checkpoints = tmp_path / "server/runs/mine/checkpoints"
    while process.poll() is None and not (checkpoints / "2").exists():
        time.sleep(0.01)
    server.kill()
    server.wait()
    reported = next(line for line in process.stderr if "warning: gs://runs/mine" in line or "error: " in line)
    serve_gcs(tmp_path / "server", port=int(url.rpartition(":")[2]))
    code, message = process.wait(), process.stderr.read()
    process.stderr.close()
    assert code in (0, 75), reported + message  # 75 if Orbax gave up first
    if code == 75:
        process = start(Bucket("gs://runs/mine"), tmp_path, *arguments, **environment(url))
        message = process.communicate()[1]
        assert process.returncode == 0, message
    run = tmp_path / "server/runs/mine"
    assert figures((run / "metrics.jsonl").read_text()) == figures((on_disk / "metrics.jsonl").read_text())
    policy = "policy/model.safetensors"
    assert (run / policy).read_bytes() == (on_disk / policy).read_bytes()


def start_processes(run, tmp_path, count, *arguments, **given):
    """Starts the processes of one run, each with empty folders of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = ["--config.mesh.fsdp=1", "--config.processes.timeout_seconds=20", *arguments]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COMPILER_FLAGS} --xla_force_host_platform_device_count={4 // count}",
    }
    if count > 1:
        settings |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        start(
            run,
            tmp_path / f"host{number}",
            *flags,
            **given,
            **settings,
            **({"JAX_PROCESS_ID": str(number)} if count > 1 else {}),
        )
        for number in range(count)
    ]


def finish(processes):
    """Exit codes and messages."""
    messages = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], messages


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_hosts_with_nothing_in_common_but_the_bucket_lose_one_and_others_resume(count, run, on_disk, tmp_path):
    processes = start_processes(run, tmp_path / "first", 2, "--config.checkpoint.every=1")
    wait_for_checkpoint(run, processes[0])
    processes[1].kill()
    codes, messages = finish(processes)
    assert codes[0] in (75, -signal.SIGABRT) and codes[1] == -signal.SIGKILL, messages[0]
    codes, messages = finish(start_processes(run, tmp_path / "second", count))
    assert codes == [0] * count, "\n".join(messages)
    assert "continuing after step" in messages[0]
    rows = zip(
        figures(run.read("metrics.jsonl").decode()), figures((on_disk / "metrics.jsonl").read_text()), strict=True
    )
    for found, wanted in rows:
        assert found["step"] == wanted["step"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4), found["step"]

    folder = tmp_path / "downloaded"
    for name in run.versions("policy/"):
        run.download(name, folder / name)
    one, other = (safetensors.numpy.load_file(place / "policy/model.safetensors") for place in (folder, on_disk))
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], atol=1e-4)
    assert transformers.AutoConfig.from_pretrained(folder / "policy").vocab_size > 0
    assert transformers.AutoTokenizer.from_pretrained(folder / "policy").encode("Hello")
