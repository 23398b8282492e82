"""What a run leaves beside its steps: completions, verdicts, the policy, adapters, a value head and the report."""

import contextlib
import json
import math
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from kto_jax.config import (
    Config,
    DataConfig,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    SamplesConfig,
)
from kto_jax.config.packages import is_installed
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.weights.export import Rounding
from kto_jax.models.weights.value_head import load_value_head
from kto_jax.reports import results, samples
from kto_jax.storage.run_place import RunPlace
from kto_jax.train import prepare
from kto_jax.training.initial_state import make_abstract_state, make_state
from kto_jax.training.reference import choose_dtype
from kto_jax.training.result import choose_export_dtype
from kto_jax.training.run_folder import open_run
from kto_jax.training.step import make_recipe
from tests import ROOT, TINY_MODEL

SHORT = SamplesConfig(num_prompts=3, max_new_tokens=4, judges=("feedback", "vader"))


@pytest.fixture
def begin(tmp_path, monkeypatch, tmp_path_factory):
    """Opens a run with a configuration; returns what the functions of `results` are called with."""
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "results_cache"))
    with contextlib.ExitStack() as stack:

        def open_with(**changes):
            data = DataConfig(
                train=str(ROOT / "configs" / "tiny_feedback.jsonl"), max_length=64, max_prompt_length=48, holdout=0.1,
                judge_holdout=0.3, num_workers=1,
            )  # fmt: skip
            model = ModelConfig(path=str(TINY_MODEL), init="random", dtype="float32")
            values = {"data": data, "model": model, "batch_size": 16, "microbatch_rows": 8, "max_steps": 1}
            config = choose_export_dtype(choose_dtype(Config(**(values | changes))))
            place = RunPlace(tmp_path / "run")
            (tmp_path / "scratch").mkdir()
            inputs, mesh, model = prepare(config, place.path, tmp_path / "scratch")
            run = open_run(place, config, inputs.index, inputs.tokenizer, inputs.architecture)
            stack.enter_context(run.lock)
            recipe = make_recipe(config, inputs.objective, model, inputs.num_steps)
            abstract = make_abstract_state(config, inputs, model, mesh, recipe.optimizer)
            return model, make_state(config, inputs, model, recipe.optimizer, abstract), inputs, run, config

        yield open_with


def test_completions_and_verdicts_before_and_after_are_in_the_report(begin, capsys):
    opened = begin(samples=SHORT)
    run = opened[3].path
    results.write_samples("before", *opened)
    before = samples.load_samples(run / "samples_before.json")
    results.write_results(*opened, "python -m kto_jax.train --config=configs/tiny.py", ["stopped early"])
    # Nothing was trained, and the random keys are the same.
    assert samples.load_samples(run / "samples_after.json") == before
    assert len(before.completions) == 3 and all(prompt[-1]["role"] == "user" for prompt in before.prompts)
    assert all(length == 4 or ended for length, ended in zip(before.num_tokens, before.ended, strict=True))
    assert 100 < before.perplexity < 2000, "near the size of the vocabulary, 512, for random weights"

    verdicts = json.loads((run / "verdicts.json").read_text())
    assert [(verdict["judge"], verdict["figure"]) for verdict in verdicts] == [
        ("feedback", "judged desirable (share)"), ("feedback", "desirable probability"),
        ("vader", "positive (share)"), ("vader", "compound"), ("reference", "perplexity of the completions"),
    ]  # fmt: skip
    assert all(verdict["before"] == verdict["after"] for verdict in verdicts)
    assert all(verdict["prompts"] == 3 and verdict["low"] <= 0 <= verdict["high"] for verdict in verdicts[:4])
    assert verdicts[0]["accuracy"] > 0.8 and "accuracy" not in verdicts[2]
    said = " ".join(capsys.readouterr().err.split())
    assert "policy/ is written in float32, which rounds no weight" in said
    assert "reference, perplexity of the completions: " in said

    assert load_file(run / "policy" / "model.safetensors").keys()
    assert not (run / "adapter").exists() and not list(run.glob("value_head*"))
    if all(map(is_installed, results.REPORT_PACKAGES)):
        report = (run / "report.html").read_text()
        assert "stopped early" in report and "The judge feedback was fitted on" in report
        for prompt in before.prompts:
            assert prompt[-1]["content"] in report


ADAPTERS = LoraConfig(rank=2, alpha=4)


def test_adapters_are_written_beside_the_policy_and_a_report_without_its_packages_is_skipped(
    begin, capsys, monkeypatch
):
    monkeypatch.setattr(results, "is_installed", lambda package: package != "matplotlib")
    opened = begin(lora=ADAPTERS)
    run = opened[3].path
    results.write_results(*opened, "python -m kto_jax.train")
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["base_model_name_or_path"]) == (2, 4, None)
    assert "library_name: peft" in (run / "adapter" / "README.md").read_text()
    assert "library_name: transformers" in (run / "policy" / "README.md").read_text()
    assert not [name for name in load_file(run / "policy" / "model.safetensors") if "lora" in name]
    said = " ".join(capsys.readouterr().err.split())
    assert "report.html is skipped: it needs matplotlib, not installed here. Run pip install matplotlib and" in said
    assert not (run / "report.html").exists() and json.loads((run / "verdicts.json").read_text()) == []


def test_a_value_head_is_kept_out_of_the_policy_in_a_file_of_its_own(begin, monkeypatch):
    monkeypatch.setattr(results, "is_installed", lambda package: False)
    opened = begin(objective=ObjectiveConfig(name="ppo_offline"))
    results.write_results(*opened, "python -m kto_jax.train")
    state, run = opened[1], opened[3].path
    head = load_value_head(run / results.VALUE_HEAD)
    assert jax.tree.all(jax.tree.map(np.array_equal, head, jax.device_get(state.policy[SCALAR_HEAD])))
    sizes = [values.size for values in load_file(run / "policy" / "model.safetensors").values()]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(state.policy) if leaf.size) - sum(
        leaf.size for leaf in jax.tree.leaves(head)
    )


@pytest.mark.parametrize("rounding, expected", [
    (Rounding(0.0, math.nan), "policy/ is written in bfloat16, which rounds no weight"),
    (Rounding(0.00391, math.nan),
     'policy/ is written in bfloat16: rounding changes a weight by up to 0.0039 of its value. '
     'config.export.dtype="float32" writes the weights as they were trained'),
    (Rounding(0.00391, 0.25), "of its value, and 0.25 times what training changed (norm). config.export.dtype="),
])  # fmt: skip
def test_the_effect_of_rounding_the_policy_is_said(rounding, expected):
    config = Config(model=ModelConfig(path="m"), export=ExportConfig(dtype="bfloat16"))
    assert expected in results.describe_rounding(config, rounding)


@pytest.mark.parametrize("changes, is_start", [
    ({}, True), ({"path": "other"}, False), ({"sync_every": 5}, False), ({"param_dtype": "int8"}, False),
])  # fmt: skip
def test_the_policy_is_compared_with_a_reference_that_is_still_its_start(changes, is_start):
    dtype = {"param_dtype": "float32"} | changes
    model = ModelConfig(path=str(TINY_MODEL), init="random", param_dtype="float32")
    config = Config(model=model, reference=ReferenceConfig(**dtype))
    state = types.SimpleNamespace(reference={"weights": 1})
    assert results._start(state, config) == (state.reference if is_start else None)
    assert results._start(types.SimpleNamespace(reference={}), config) is None


def test_a_report_names_the_version_of_what_is_installed_and_of_what_is_not():
    assert results._version("numpy") == f"numpy {np.__version__}"
    assert results._version("kto_jax_of_nowhere") == "kto_jax_of_nowhere from its sources"
