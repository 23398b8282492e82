"""Runs that start from adapters: the policy and the reference are the base plus the adapters."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.sampling.complete import complete
from kto_jax.sampling.sample import Sampling
from kto_jax.train import main
from kto_jax.training.stored_policy import load_policy
from tests import ROOT, TINY_MODEL
from tests.base_model import write_base
from tests.models.weights.test_adapter_folder import write_adapter

STILL = ["--config.optimizer.learning_rate=1e-12", "--config.max_steps=1"]
ADAPTERS = ["--config.lora.rank=2", "--config.lora.alpha=6", "--config.lora.targets=query"]
CONTINUED = [*ADAPTERS, "--config.lora.start=continue"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with weights, and beside it a folder of adapters that change it."""
    folder = tmp_path_factory.mktemp("start")
    write_adapter(folder / "adapter", read_config(TINY_MODEL))
    return write_base(folder / "model")


@pytest.fixture(scope="module")
def adapter(base):
    return base.parent / "adapter"


@pytest.fixture
def run(base, adapter, tmp_path, monkeypatch, tmp_path_factory):
    """(settings) -> the folder of a run that was trained with them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "start_cache"))

    def train(*settings, path=adapter, workdir=tmp_path / "run", code=0):
        command = ["--config=configs/tiny.py", f"--config.model.path={path}", "--config.model.init=pretrained"]
        command += ["--config.data.holdout=0", f"--workdir={workdir}"]
        assert main([*command, *settings]) == code
        return workdir

    return train


def tensors(path):
    """The weights of a model, or of a base with adapters, by name of the parameter."""
    files = find_model(str(path))
    params = load_params(Model.create(read_config(files.weights)), files, param_dtype="float32")
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_near(found, wanted):
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def first_row(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("settings, use", [
    pytest.param([], "all of whose weights are trained", marks=pytest.mark.nightly),
    pytest.param(["--config.lora.rank=4"], "new ones are trained", marks=pytest.mark.nightly),
    ([*CONTINUED, "--config.reference.precompute=true"], "trained further"),
], ids=["full", "new", "continue"])  # fmt: skip
def test_the_policy_and_the_reference_begin_as_base_plus_adapters(run, base, adapter, capsys, settings, use):
    folder = run(*STILL, *settings)
    assert use in " ".join(capsys.readouterr().err.split())
    assert first_row(folder)["loss"] == pytest.approx(0.5, abs=1e-6)
    assert_near(tensors(folder / "policy"), tensors(adapter))
    assert json.loads((folder / "config.json").read_text())["model"]["base"] == str(base)
    if settings:
        assert_near(tensors(folder / "adapter"), tensors(adapter))
        assert find_model(str(folder / "adapter")).weights == base
    else:
        greedy = Sampling(temperature=0.0, max_new_tokens=8)
        merged, summed = (complete(str(path), ["name a film"], greedy)[0].text for path in (folder / "policy", adapter))
        assert merged == summed


def test_adapters_that_are_trained_further_change_and_the_reference_does_not(run, base, adapter):
    steps = ["--config.optimizer.learning_rate=1e-1", "--config.optimizer.warmup_steps=0", "--config.max_steps=2"]
    folder = run(*CONTINUED, *steps)
    assert first_row(folder)["loss"] == 0.5  # The reference has the adapters too.
    before, after = (load_file(place / "adapter_model.safetensors") for place in (adapter, folder / "adapter"))
    assert before.keys() == after.keys()
    assert all(np.abs(after[name] - before[name]).max() > 0.05 for name in before)
    merged, policy = tensors(folder / "adapter"), tensors(folder / "policy")
    assert_near(policy, merged)
    # The newest checkpoint is read with the reference's own adapters replaced by the trained ones.
    _, params, _ = load_policy(folder)
    found = jax.tree.map(lambda leaf: leaf.astype("float32"), params, is_leaf=lambda node: hasattr(node, "frozen"))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    assert_near({jax.tree_util.keystr(key): leaf for key, leaf in leaves}, policy)
    # A resumed run restores the reference with its adapters.
    again = run(*CONTINUED, *steps)
    assert_near(tensors(again / "policy"), policy)


@pytest.mark.nightly
def test_the_reference_may_be_a_folder_of_adapters_of_its_own(run, base, adapter):
    same = run(*STILL, f"--config.reference.path={adapter}")
    assert first_row(same)["margin"] == pytest.approx(0, abs=1e-6)
    differs = run(*STILL, f"--config.reference.path={adapter}", path=base, workdir=same.parent / "other")
    assert first_row(differs)["margin"] != pytest.approx(0, abs=1e-4)
    assert json.loads((differs / "config.json").read_text())["reference"]["base"] == str(base)


@pytest.mark.parametrize("settings, message", [
    (["--config.lora.start=continue"], "config.lora.start='continue' has no use: lora.rank is 0"),
    ([*CONTINUED, "--config.lora.rank=4"], "Set --config.lora.rank=2, or config.lora.start"),
    (["--config.model.init=random"], 'config.model.init="random" leaves out the weights'),
    ([*CONTINUED, "--config.lora.zero=a"], "config.lora.zero='a' has no use"),
])  # fmt: skip
def test_settings_that_do_not_go_with_the_adapters_are_refused(run, capsys, settings, message):
    run(*STILL, *settings, code=2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_there_must_be_adapters_to_train_further(run, base, capsys):
    run(*STILL, *CONTINUED, path=base, code=2)
    assert "holds none. It must be a folder with adapter_config.json" in " ".join(capsys.readouterr().err.split())
