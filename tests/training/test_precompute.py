"""Training with precomputed reference log-probabilities: the same numbers, without a reference in memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import kto_jax.training.precompute
from kto_jax.data.batches.reference_logps import ReferenceLogps, _numbers
from kto_jax.train import main
from kto_jax.training.logs import read_metrics
from tests import ROOT, SAME_PROGRAMS

# So many epochs that every run here reads the same rows in the same order, also the one of 500 steps.
STEPS = ["--config.epochs=40", "--config.max_steps=4", *SAME_PROGRAMS]
STORED = "--config.reference.precompute=True"
COMPARED = ("loss", "grad_norm", "margin", "z0", "kl", "eval_loss", "eval_margin", "eval_auc", "eval_z0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch, cache):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))


def train(workdir, *arguments):
    assert main(["--config=configs/tiny.py", f"--workdir={workdir}", *STEPS, *arguments]) == 0
    return read_metrics(workdir / "metrics.jsonl")


def train_once(folder, cache, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(cache))
        train(folder, *arguments)
    return folder


@pytest.fixture(scope="module")
def held(tmp_path_factory, cache):
    """A run that holds the reference."""
    return train_once(tmp_path_factory.mktemp("held"), cache)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, cache):
    """The same from log-probabilities that it computed first."""
    return train_once(tmp_path_factory.mktemp("stored"), cache, STORED)


def stores(cache):
    return sorted((cache / "reference_logps").glob("*"))


def assert_same_losses(held, stored):
    """Returns the figures of both runs."""
    held, stored = (read_metrics(run / "metrics.jsonl") for run in (held, stored))
    assert len(held) == len(stored) >= 4
    for before, after in zip(held, stored, strict=True):
        for name in set(COMPARED) & before.keys():
            # Means of log-probabilities of over 128 nats, whose spacing in float32 is 1.5e-5; off by 1.4e-6 here.
            tolerance = 5e-6 if name in ("kl", "z0", "eval_z0") else 1e-6
            assert after[name] == pytest.approx(before[name], abs=tolerance, rel=1e-6), name
        assert after["flops"] < before["flops"]
    assert held[-1]["margin"] != 0
    return held, stored


def test_losses_are_those_of_a_run_that_holds_the_reference(held, stored):
    assert_same_losses(held, stored)
    assert (held / "checkpoints" / "reference").exists()
    assert not (stored / "checkpoints" / "reference").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    pytest.param(
        ["--config.epochs=3", "--config.batch_size=100", "--config.max_steps=5"],  # into the third epoch
        marks=pytest.mark.nightly,
    ),
    [
        *("--config.objective.name=dpo", "--config.data.train=configs/tiny_pairs.jsonl", "--config.data.format=pairs"),
        "--config.reference.param_dtype=bfloat16",
    ],
    *(pytest.param(options, marks=pytest.mark.exhaustive) for options in (
        ["--config.objective.name=apo_zero_unpaired", "--config.model.param_dtype=bfloat16"],
        ["--config.reference.param_dtype=int8"],
    )),
], ids=lambda options: options[-1].split(".")[-1])  # fmt: skip
def test_losses_equal_those_of_a_run_with_the_reference_in_memory_in_every_dtype(tmp_path, options, pairs_file):
    options = [option.replace("configs/tiny_pairs.jsonl", str(pairs_file)) for option in options]
    train(tmp_path / "held", *options)
    train(tmp_path / "stored", STORED, *options)
    held, _ = assert_same_losses(tmp_path / "held", tmp_path / "stored")
    rounded = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/reference_error.json"))]
    assert len(rounded) == 2 * any("reference.param_dtype" in option for option in options)
    for errors in rounded:  # The policy still equals the reference before rounding.
        assert errors == pytest.approx(rounded[0], rel=1e-3)
        assert 0 < errors["logps_mean"] <= errors["logps_max"] < 1
        assert errors["rewards_max"] == pytest.approx(0.1 * errors["logps_max"])
        assert held[0]["margin"] != 0


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"name {i}", "chosen": f"good {i} yes", "rejected": f"bad {i % 7}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.nightly
def test_a_second_run_loads_no_reference(tmp_path, monkeypatch, stored):
    def refuse(*arguments):
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr(kto_jax.training.precompute, "load_reference", refuse)
    # Independent of the packing.
    second = train(tmp_path / "second", STORED, "--config.row_length=96", "--config.microbatch_rows=16")
    first = read_metrics(stored / "metrics.jsonl")
    np.testing.assert_allclose([row["loss"] for row in second], [row["loss"] for row in first], atol=1e-6)
    with pytest.raises(AssertionError, match="was loaded"):
        train(tmp_path / "third", STORED, "--config.seed=1")


def test_a_run_whose_reference_has_changed_is_refused(tmp_path, capsys, held):
    model = tmp_path / "model"
    shutil.copytree(held / "policy", model)
    own = [f"--config.model.path={model}", "--config.model.init=pretrained", "--config.max_steps=1"]
    train(tmp_path / "run", STORED, *own)
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    safetensors.numpy.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    command = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *STEPS, STORED, *own]
    assert main(command) == 2
    assert "have changed since the run in" in message(capsys)


@pytest.mark.slow
def test_a_longer_run_computes_what_is_missing(tmp_path, monkeypatch, stored):
    written = []
    write = ReferenceLogps.write

    def record(self, step, *arguments):
        written.append(step)
        write(self, step, *arguments)

    monkeypatch.setattr(ReferenceLogps, "write", record)
    train(tmp_path / "long", STORED, "--config.max_steps=6")
    assert written == [4, 5]


@pytest.mark.nightly
@pytest.mark.parametrize("number, code", [
    (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_an_interrupted_precomputation_is_resumed(tmp_path, held, monkeypatch, capsys, number, code):
    cache = tmp_path / "cache"
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))
    command = [sys.executable, "-m", "kto_jax.train", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*command, *STEPS, "--config.max_steps=500", STORED], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline, done = time.monotonic() + 200, 0
    while done < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
        new = [path / "unmatched.npy" for path in stores(cache) if (path / "unmatched.npy").exists()]
        done = max([int(np.sum(~np.isnan(_numbers(np.load(path))[:, 0]))) for path in new], default=0)
    process.send_signal(number)
    message = process.communicate()[1]
    assert 3 <= done < 500, message
    assert process.returncode == code, message
    gone_on = train(tmp_path / "stored", STORED)
    wanted = read_metrics(held / "metrics.jsonl")
    assert [row["loss"] for row in gone_on] == pytest.approx([row["loss"] for row in wanted], abs=1e-6)
    said = re.search(r"reference log-probabilities: (\d+) steps to compute", capsys.readouterr().err)
    assert int(said[1]) <= 4 - 3 + 1


def test_a_reference_with_a_non_finite_log_probability_is_refused(tmp_path, monkeypatch, capsys):
    broken = lambda *arguments: jnp.full(arguments[2].filled.shape, -jnp.inf)  # noqa: E731
    monkeypatch.setattr(kto_jax.training.precompute, "packed_logps", broken)
    command = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *STEPS, STORED, "--config.seed=9"]
    assert main(command) == 2
    assert re.search(r"gives 16 completions .* not finite, among them .*tiny_feedback.jsonl:\d+", message(capsys))


@pytest.mark.parametrize("options, why", [
    (["--config.reference.sync_every=2"], "sync_every=2 moves the reference"),
    (["--config.objective.humanline=True"], "needs them per token"),
    (["--config.objective.name=ppo_offline"], "needs them per token"),
    (["--config.objective.name=sft"], "holds no reference"),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_settings_that_need_the_reference_itself_are_refused(tmp_path, capsys, options, why):
    command = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *STEPS, STORED, *options]
    assert main(command) == 2
    assert why in message(capsys)
    assert not (tmp_path / "run").exists()


def message(capsys):
    return " ".join(capsys.readouterr().err.split())
