"""The command itself: real processes, real files, real signals, on the tiny model."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kto_jax import score
from kto_jax.config import TransientError
from kto_jax.storage.locks import lock_file
from kto_jax.train import main
from kto_jax.training.run_folder import _MAY_DIFFER
from tests import ROOT, SAME_PROGRAMS

TINY = [
    "--config=configs/tiny.py",
    "--config.max_steps=12",
    "--config.checkpoint.every=3",
    "--config.evaluation.every=6",
    *SAME_PROGRAMS,
    "--config.data.eos_token=<|im_start|>",
]
CONTINUE = """
import sys
from kto_jax.train import main

code = main(sys.argv[1:])
print([name for name in ("transformers", "torch", "tensorflow", "datasets") if name in sys.modules])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(workdir, cache, *arguments, program=("-m", "kto_jax.train"), **options):
    """Starts a process with the devices of this one, so that both compile the same programs."""
    environment = os.environ | {"KTO_JAX_CACHE": str(cache)}
    command = [sys.executable, *program, *TINY, f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    message = process.communicate(timeout=300)[1]
    return process.returncode, message


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(workdir, step, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


def numbers(workdir):
    """The figures of every step that do not depend on the clock."""
    timed = ("seconds", "wait_seconds", "compile_seconds", "tokens_per_second", "mfu")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows(workdir)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    """The folder of a run of this process."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(cache))
        assert main([*TINY, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_run_leaves_its_whole_folder_and_the_margin_rises(unbroken):
    expected = {"config.json", "manifest.json", "model.json", "metrics.jsonl", "checkpoints", "policy", "report.html"}
    assert expected <= {path.name for path in unbroken.iterdir()}
    log = rows(unbroken)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert log[0]["margin"] == 0  # policy = reference
    assert log[0]["loss"] == 0.5
    assert log[-1]["margin"] > 0.5
    assert log[-1]["eval_auc"] > 0.9
    assert all(0 <= row["wait_seconds"] < 5 for row in log)
    assert [row["step"] for row in log if "eval_loss" in row] == [6, 12]
    assert "12 steps" in (unbroken / "policy" / "README.md").read_text()


def test_the_newest_checkpoints_are_kept(unbroken):
    assert {path.name for path in (unbroken / "checkpoints").iterdir()} == {"9", "12", "reference"}


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [
    # Of SIGTERM: the loop and the exit code in tests/training, whole runs below.
    (signal.SIGKILL, -9), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive),
    pytest.param(signal.SIGTERM, 75, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(number, code, unbroken, cache, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, cache)
    wait_for_step(workdir, 4, process)
    process.send_signal(number)
    ended, message = finish(process)
    assert ended == code
    assert message.startswith("importing JAX …\n")  # before the seconds that this takes
    assert ("stopping after this step; press again to stop now\n" in message) == (number == signal.SIGINT)
    assert not (workdir / "policy").exists()
    # With a cache of its own, so that it tokenizes again.
    process = start(workdir, tmp_path, "--config.max_bad_steps=3", program=("-c", CONTINUE), stdout=subprocess.PIPE)
    large_modules, message = process.communicate(timeout=300)
    assert process.returncode == 0, message
    assert large_modules == "[]\n"  # Only the worker imports transformers.
    assert "continuing after step" in message
    assert message.splitlines()[-1].endswith(f"next: python -m kto_jax.export --run={workdir}")
    parts = [json.loads(line) for line in (workdir / "config_history.jsonl").read_text().splitlines()]
    assert [part["config"]["max_bad_steps"] for part in parts] == [10, 3]
    assert parts[0]["first_step"] == 0 and parts[1]["first_step"] in range(3, 12)
    assert numbers(workdir) == numbers(unbroken)
    assert (workdir / "policy/model.safetensors").read_bytes() == (unbroken / "policy/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [
    # Of SIGKILL: a run without loaders above, loaders without a run in tests/data/batches/test_prefetch.py.
    (signal.SIGTERM, 75), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.exhaustive),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_a_run_with_loader_processes_ends_and_resumes_like_any_other(number, code, unbroken, cache, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, cache, "--config.data.num_loaders=2", start_new_session=True)
    wait_for_step(workdir, 5, process)
    loaders = _children(process.pid)
    assert len(loaders) == 2
    # As Slurm and a terminal do, to all processes of the run; but the kill only to the run itself.
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    while number == signal.SIGTERM and process.poll() is None:
        # An impatient scheduler: during the save, after it, and while Python ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
        process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == code
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in loaders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in loaders)
    code, message = finish(start(workdir, cache, "--config.data.num_loaders=1"))
    assert code == 0, message
    assert numbers(workdir) == numbers(unbroken)
    assert (workdir / "policy/model.safetensors").read_bytes() == (unbroken / "policy/model.safetensors").read_bytes()


def _children(pid):
    """The processes that a process has started, but the resource tracker of `multiprocessing`."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.mark.nightly
def test_a_synced_reference_the_state_of_an_objective_and_rounding_survive_a_kill(cache, tmp_path):
    options = (
        *("--config.objective.name=bco", "--config.reference.sync_every=4"),
        # Stochastic rounding must also continue with the same bits.
        *("--config.model.param_dtype=bfloat16", "--config.optimizer.moments_dtype=bfloat16"),
    )
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert finish(start(unbroken, cache, *options))[0] == 0
    process = start(broken, cache, *options)
    wait_for_step(broken, 7, process)
    process.kill()
    finish(process)
    code, message = finish(start(broken, cache, *options))
    assert code == 0, message
    assert "continuing after step" in message
    assert numbers(broken) == numbers(unbroken)
    assert rows(broken)[-1]["running_count"] == 12 * 16
    assert json.loads((broken / "policy/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not (broken / "checkpoints" / "reference").exists()  # it is synced, and part of every checkpoint
    assert (broken / "policy/model.safetensors").read_bytes() == (unbroken / "policy/model.safetensors").read_bytes()


def test_a_reward_model_is_trained_exported_and_scores(tmp_path, capsys):
    workdir, scored = tmp_path / "reward", tmp_path / "scored.jsonl"
    assert main([*TINY, "--config.objective.name=reward", "--config.max_steps=2", f"--workdir={workdir}"]) == 0
    assert json.loads((workdir / "policy/config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2"}  # no reference
    assert score.main([f"--model={workdir}", f"--out={scored}", "--data=configs/tiny_feedback.jsonl"]) == 0
    assert len(scored.read_text().splitlines()) == 240
    message = refused(capsys, *TINY, f"--workdir={tmp_path / 'next'}", f"--config.model.path={workdir / 'policy'}")
    assert "is a reward model" in message


def test_what_completions_end_in_is_what_ends_the_texts_of_the_exported_policy(unbroken):
    generation = json.loads((unbroken / "policy/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1]  # the model's own, and the one that was taught


def refused(capsys, *arguments):
    """The message of a command that must end with exit code 2."""
    assert main(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def in_place(monkeypatch, cache):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))


@pytest.mark.parametrize("argument, message", [
    ("--config.objective.betta=0.2", "Did you mean 'beta'"),
    ("--config.objective.name=ktoo", "Did you mean 'kto'"),
    ("--config.objective.beta=-1", "Allowed: a number above 0"),
    ("--config.objective.margin=1", "has no effect on the objective 'kto'"),
    ("--config.objective.rewards=scores", "has no effect on the objective 'kto'"),
    ("--config.samples.judges=vade", "Did you mean 'vader'?"),
    ("--config.data.train=missing.jsonl", "missing.jsonl"),
    ("--config.model.path=missing_model", "missing_model"),
    ("--config.data.label_field=thumb", "thumb"),
    ("--config.data.max_length=4096", "beyond the model's context of 2048"),
    ("--config.completion_share=0.2", "completion_share"),
    ("--config.microbatch_rows=3", "Set config.microbatch_rows to 8"),
    ("--config.model.remat=offload", "cannot be used on cpu"),
    ("--config.mesh.data=3", "does not multiply to the 8 devices"),
    ("--config.mesh.tensor=4", "num_kv_heads=2"),
    ("--workdirr=x", "Did you mean '--workdir'"),
    ("extra", "is not a flag"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_before_a_step_is_taken(argument, message, capsys, tmp_path):
    workdir = tmp_path / "run"
    assert message in refused(capsys, *TINY, f"--workdir={workdir}", argument)
    assert not workdir.exists()


def test_a_missing_config_is_refused(capsys):
    assert "--config is missing" in refused(capsys)
    assert "configs/none.py" in refused(capsys, "--config=configs/none.py")


@pytest.mark.parametrize("text, message", [
    ("import no_such_module", "no_such_module"), ("def get_config(:", "SyntaxError"), ("x = y", "NameError"),
])  # fmt: skip
def test_a_config_file_that_raises_is_refused(text, message, capsys, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    assert message in refused(capsys, f"--config={tmp_path / 'broken.py'}")


def test_a_directory_is_no_config_and_an_unknown_protocol_no_workdir(capsys):
    assert "--config=configs is a folder" in refused(capsys, "--config=configs")
    assert "--workdir=ftp://host/run cannot be used" in refused(capsys, *TINY, "--workdir=ftp://host/run")


def test_help_lists_the_fields(capsys):
    assert main(["--help"]) == 0
    assert "learning_rate" in capsys.readouterr().out


def test_a_workdir_that_holds_something_else_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds files but no run" in refused(capsys, *TINY, f"--workdir={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "cannot be written to" in refused(capsys, *TINY, f"--workdir={tmp_path / 'thesis.txt' / 'run'}")
    model = tmp_path / "model"
    shutil.copytree(ROOT / "configs" / "tiny_model", model)
    before = contents(model)
    assert "is not a run that can be resumed" in refused(capsys, *TINY, f"--workdir={model}")
    assert contents(model) == before


def test_labels_that_are_not_mapped_refuse_the_run_with_file_and_line(capsys, tmp_path):
    path = tmp_path / "thumbs.jsonl"
    row = {"prompt": "Say hello.", "completion": "Hello there.", "label": "maybe"}
    path.write_text((json.dumps(row) + "\n") * 3)
    message = refused(capsys, *TINY, f"--workdir={tmp_path / 'run'}", f"--config.data.train={path}")
    assert "maybe" in message
    assert "thumbs.jsonl:1" in message


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("argument, message", [
    ("--config.objective.beta=0.2", "config.objective.beta: was 'auto', is 0.2"),
    ("--config.seed=1", "config.seed: was 0, is 1"),
    ("--config.data.max_length=63", "config.data.max_length: was 64, is 63"),
    ("--config.samples.temperature=0.5", "config.samples.temperature: was 1.0, is 0.5"),
])  # fmt: skip
def test_another_run_in_the_same_folder_is_refused_and_nothing_is_overwritten(argument, message, unbroken, capsys):
    before = contents(unbroken)
    assert message in refused(capsys, *TINY, f"--workdir={unbroken}", argument)
    assert contents(unbroken) == before


def test_a_run_that_predates_some_fields_is_resumed_with_their_defaults(unbroken, capsys, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    recorded = {name: json.loads((workdir / f"{name}.json").read_text()) for name in ("config", "model")}
    del recorded["config"]["model"]["param_dtype"], recorded["config"]["reference"], recorded["model"]["head_dim"]
    for name, values in recorded.items():
        (workdir / f"{name}.json").write_text(json.dumps(values))
    other = "--config.reference.param_dtype=bfloat16"
    message = refused(capsys, *TINY, f"--workdir={workdir}", other)
    assert "holds another run (config.reference.param_dtype: was 'float32', is 'bfloat16')" in message


def test_another_run_is_refused_before_any_device_is_touched(unbroken, capsys, monkeypatch):
    def touched(*arguments):
        raise AssertionError("a device was touched")

    monkeypatch.setattr("kto_jax.train.jax.device_count", touched)
    monkeypatch.setattr("kto_jax.devices.processes.jax.process_count", touched)
    assert "was 0, is 1" in refused(capsys, *TINY, f"--workdir={unbroken}", "--config.seed=1")


def test_a_tracker_without_its_package_is_refused_before_anything_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("kto_jax.train.prepare", lambda *_: pytest.fail("something was read"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "kto_jax.config.packages.importlib.util.find_spec", lambda name: None if name == "mlflow" else find(name)
    )
    message = refused(capsys, *TINY, f"--workdir={tmp_path / 'run'}", "--config.trackers=mlflow")
    assert "pip install mlflow" in message


def test_a_failure_that_may_pass_ends_with_the_code_that_launchers_restart(capsys, monkeypatch, tmp_path):
    def fail(*arguments):
        raise TransientError("the share lags. It must not. Try again.")

    monkeypatch.setattr("kto_jax.train.prepare", fail)
    assert main([*TINY, f"--workdir={tmp_path / 'run'}"]) == 75
    assert "the share lags. It must not. Try again." in capsys.readouterr().err


def test_feedback_that_changed_under_a_run_is_refused(unbroken, capsys, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    manifest = json.loads((workdir / "manifest.json").read_text())
    (workdir / "manifest.json").write_text(json.dumps(manifest | {"content_sha256": "other"}))
    assert "data.content_sha256: was 'other'" in refused(capsys, *TINY, f"--workdir={workdir}")


def test_a_checkpoint_of_another_model_is_refused_with_its_arrays(unbroken, capsys, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["optimizer"]["name"] = "rmsprop"
    (workdir / "config.json").write_text(json.dumps(config))
    message = refused(capsys, *TINY, f"--workdir={workdir}", "--config.optimizer.name=rmsprop")
    assert "checkpoint of another model or optimizer: opt_state/" in message
    assert "unexpected" in message


def test_two_processes_may_not_write_to_one_folder(unbroken, capsys):
    before = contents(unbroken)
    with (unbroken / ".lock").open("a+") as lock:
        lock_file(lock, wait=False, without="")
        lock.seek(0)
        assert main([*TINY, f"--workdir={unbroken}"]) == 75
        assert f"in use by process {lock.read()}." in " ".join(capsys.readouterr().err.split())
    assert contents(unbroken) == before


def test_the_fields_that_a_continued_run_may_change_exist():
    from kto_jax.config import Config, to_dict

    for path in _MAY_DIFFER:
        value = to_dict(Config())
        for name in path.split("."):
            value = value[name]
