"""The result of a run: the dtype and the step of policy/; and runs that are made longer."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kto_jax.config import Config, ExportConfig, ModelConfig
from kto_jax.models.weights.stored_dtype import common_dtype
from kto_jax.train import main
from kto_jax.training.result import choose_export_dtype
from kto_jax.training.resume import with_recorded_settings
from tests import ROOT, SAME_PROGRAMS
from tests.base_model import write_base

CONSTANT = [*SAME_PROGRAMS, "--config.data.holdout=0"]


@pytest.mark.parametrize("dtypes, expected", [
    (("bfloat16", "bfloat16"), "bfloat16"), (("float16", "float16"), "float16"), (("float16", "float32"), "float32"),
    (("bfloat16", "float16"), "float32"),
])  # fmt: skip
def test_the_written_dtype_is_the_common_dtype_of_all_weights(tmp_path, dtypes, expected):
    save_file({f"w{i}": np.ones(4, jnp.dtype(dtype)) for i, dtype in enumerate(dtypes)}, tmp_path / "model.safetensors")
    assert common_dtype(tmp_path) == expected


@pytest.mark.parametrize("values, expected", [
    ({"torch_dtype": "float16"}, "float16"), ({"dtype": "bfloat16"}, "bfloat16"), ({}, "float32"),
])  # fmt: skip
def test_without_weights_config_json_says_what_is_written(tmp_path, values, expected):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert common_dtype(tmp_path) == expected
    config = Config(model=ModelConfig(path=str(tmp_path)))
    assert choose_export_dtype(config).export.dtype == expected


def test_a_policy_of_bfloat16_weights_is_written_in_bfloat16(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = Config(model=ModelConfig(path=str(tmp_path), param_dtype="bfloat16"))
    assert choose_export_dtype(config).export.dtype == "bfloat16"
    chosen = dataclasses.replace(config, export=ExportConfig(dtype="float32"))
    assert choose_export_dtype(chosen) == chosen


def test_a_run_that_predates_the_export_dtype_is_exported_in_its_training_dtype(tmp_path):
    recorded = dataclasses.asdict(Config())
    del recorded["export"]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    assert with_recorded_settings(Config(), tmp_path).export.dtype == "float32"
    (tmp_path / "config.json").write_text(json.dumps(recorded | {"export": {"dtype": "float16"}}))
    assert with_recorded_settings(Config(), tmp_path).export.dtype == "float16"


@pytest.mark.slow
def test_policy_is_written_in_the_dtype_of_the_base_unless_another_is_set(in_the_project, tmp_path, capsys):
    base = write_base(tmp_path / "base", "bfloat16")
    tuned = ["--config=configs/tiny.py", f"--config.model.path={base}", "--config.model.init=pretrained"]
    tuned += ["--config.max_steps=1", "--config.data.holdout=0"]
    assert main([*tuned, f"--workdir={tmp_path / 'run'}"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    # At most by half the spacing of bfloat16, 2 ** -8.
    assert re.search(
        r"policy/ is written in bfloat16: rounding changes a weight by up to 0\.003[89] of its value, and", said
    )
    assert "times what training changed" in said
    policy = tmp_path / "run" / "policy"
    assert {str(leaf.dtype) for leaf in load_file(policy / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((policy / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "weights in bfloat16, trained in float32" in (policy / "README.md").read_text()
    assert "policy/ is written in bfloat16" in (tmp_path / "run" / "report.html").read_text()
    # In the same folder: the finished run is only exported again.
    assert main([*tuned, f"--workdir={tmp_path / 'run'}", "--config.export.dtype=float32"]) == 0
    assert {str(leaf.dtype) for leaf in load_file(policy / "model.safetensors").values()} == {"float32"}
    assert "policy/ is written in float32, which rounds no weight" in " ".join(capsys.readouterr().err.split())


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def policy(workdir):
    return load_file(workdir / "policy" / "model.safetensors")


def trained(workdir, *settings, code=0):
    quiet = ["--config=configs/tiny.py", "--config.evaluation.max_examples=16"]
    assert main([*quiet, f"--workdir={workdir}", *settings]) == code
    return workdir


@pytest.fixture(scope="module")
def in_the_project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "result_cache"))
        yield


@pytest.fixture(scope="module")
def whole(in_the_project, tmp_path_factory):
    """A run of 4 steps at a constant learning rate."""
    return trained(tmp_path_factory.mktemp("whole") / "run", *CONSTANT, "--config.max_steps=4")


@pytest.mark.nightly
def test_the_result_may_be_the_best_checkpoint_and_a_run_may_end_early(in_the_project, tmp_path, capsys):
    # A learning rate that makes every step worse than the first one.
    worse = [*SAME_PROGRAMS, "--config.optimizer.learning_rate=1.0", "--config.optimizer.warmup_steps=0"]
    worse += ["--config.max_steps=9", "--config.evaluation.every=1", "--config.evaluation.patience=2"]
    worse += ["--config.export.step=best"]
    run = trained(tmp_path / "run", *worse)
    said = " ".join(capsys.readouterr().err.split())
    losses = {row["step"]: row["eval_loss"] for row in rows(run)}
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 2 < 9
    assert f"stopped early after step {last}: eval_loss was best after step {best}" in said
    assert f"policy/ is of step {best} of {last}, the best eval_loss" in said
    report = (run / "report.html").read_text()
    assert "stopped early" in report and f"policy/ is of step {best} of {last}" in report
    assert f"KTO by kto_jax: {best} steps of" in (run / "policy" / "README.md").read_text()
    at_best = trained(tmp_path / "short", *worse, f"--config.max_steps={best}", "--config.evaluation.patience=0")
    for name, values in policy(at_best).items():
        np.testing.assert_array_equal(policy(run)[name], values)
    # Run again, it has ended.
    trained(run, *worse)
    assert max(row["step"] for row in rows(run)) == last


@pytest.mark.nightly
def test_a_finished_run_of_a_constant_rate_is_made_longer_as_if_it_never_ended(whole, tmp_path):
    longer = trained(tmp_path / "longer", *CONSTANT, "--config.max_steps=2")
    trained(longer, *CONSTANT, "--config.max_steps=4")
    assert [row["loss"] for row in rows(longer)] == [row["loss"] for row in rows(whole)]
    for name, values in policy(whole).items():
        np.testing.assert_array_equal(policy(longer)[name], values)


@pytest.mark.parametrize("schedule, max_steps, message", [
    pytest.param(
        *("linear", 6, "learning rate falls until its last step (config.optimizer"), marks=pytest.mark.nightly
    ),
    ("constant", 3, "holds another run (config.max_steps: was 4, is 3)"),
])  # fmt: skip
def test_a_run_that_cannot_be_made_longer_or_is_made_shorter_is_refused(
    whole, tmp_path, capsys, schedule, max_steps, message
):
    run = shutil.copytree(whole, tmp_path / "run")
    recorded = json.loads((run / "config.json").read_text())
    recorded["optimizer"]["schedule"] = schedule
    (run / "config.json").write_text(json.dumps(recorded))
    again = [f"--config.optimizer.schedule={schedule}", f"--config.max_steps={max_steps}"]
    trained(run, *CONSTANT, *again, code=2)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("settings, message", [
    (["--config.evaluation.patience=2", "--config.data.holdout=0"], "no feedback that counts is held out"),
    (["--config.export.step=best", "--config.evaluation.every=0"], "there is one evaluation, at the end"),
    (["--config.evaluation.patience=2", "--config.reference.sync_every=2"], "figures against references that differ"),
])  # fmt: skip
def test_evaluations_that_cannot_be_compared_are_refused(in_the_project, tmp_path, capsys, settings, message):
    trained(tmp_path / "run", "--config.max_steps=1", *settings, code=2)
    assert message in " ".join(capsys.readouterr().err.split())
