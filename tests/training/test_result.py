"""The result of a run: the dtype of policy/."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kto_jax.config import Config, ExportConfig, ModelConfig
from kto_jax.models.weights.stored_dtype import written_dtype
from kto_jax.train import main
from kto_jax.training.result import choose_export_dtype
from kto_jax.training.resume import as_begun
from tests import ROOT

QUICK = ["--config.max_steps=1", "--config.evaluation.every=0", "--config.evaluation.max_examples=16"]


@pytest.mark.parametrize("dtypes, expected", [
    (("bfloat16", "bfloat16"), "bfloat16"), (("float16", "float16"), "float16"), (("float16", "float32"), "float32"),
    (("bfloat16", "float16"), "float32"),
])  # fmt: skip
def test_the_written_dtype_is_the_common_dtype_of_all_weights(tmp_path, dtypes, expected):
    save_file({f"w{i}": np.ones(4, jnp.dtype(dtype)) for i, dtype in enumerate(dtypes)}, tmp_path / "model.safetensors")
    assert written_dtype(tmp_path) == expected


@pytest.mark.parametrize("values, expected", [
    ({"torch_dtype": "float16"}, "float16"), ({"dtype": "bfloat16"}, "bfloat16"), ({}, "float32"),
])  # fmt: skip
def test_without_weights_config_json_says_what_is_written(tmp_path, values, expected):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert written_dtype(tmp_path) == expected
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
    assert as_begun(Config(), tmp_path).export.dtype == "float32"
    (tmp_path / "config.json").write_text(json.dumps(recorded | {"export": {"dtype": "float16"}}))
    assert as_begun(Config(), tmp_path).export.dtype == "float16"


def test_policy_is_written_in_the_dtype_of_the_base_unless_another_is_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base = tmp_path / "base"
    quiet = ["--config=configs/tiny.py", *QUICK]
    assert main([*quiet, f"--workdir={tmp_path / 'first'}", "--config.export.dtype=bfloat16"]) == 0
    (tmp_path / "first" / "policy").rename(base)
    tuned = [*quiet, f"--config.model.path={base}", "--config.model.init=pretrained"]
    assert main([*tuned, f"--workdir={tmp_path / 'run'}"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "policy/ is written in bfloat16: rounding changes a weight by up to 0.0039 of its value, and" in said
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
