"""The dtype of the reference: at the first step it agrees with the policy, also after SFT."""

import dataclasses
import json
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kto_jax.config import (
    Config,
    ConfigError,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    resolve,
)
from kto_jax.models.weights.stored_dtype import stored_dtype
from kto_jax.objectives import check_objective
from kto_jax.train import main, train
from kto_jax.training.preemption import Preemption
from kto_jax.training.reference import check_error, choose_dtype, is_rounded
from tests import ROOT
from tests.base_model import write_base

TINY = ROOT / "configs" / "tiny_model"
PUBLISHED = str(ROOT / "configs/architectures/llama_3_1_8b")
RECIPES = sorted((ROOT / "configs").glob("*.py"))
QUICK = ["--config.max_steps=1", "--config.data.holdout=0"]


def resolved(recipe):
    return resolve(runpy.run_path(str(recipe))["get_config"]())


def with_reference(recipe):
    return check_objective(resolved(recipe).objective).uses_reference


# The other recipes differ in the objective and the optimizer, and not in how the reference is read.
MARKS = {"kto_llama": (), "dpo_llama": pytest.mark.nightly, "ppo_offline_llama": pytest.mark.nightly}
CASES = [
    pytest.param(recipe, marks=MARKS.get(recipe.stem, pytest.mark.exhaustive))
    for recipe in RECIPES
    if with_reference(recipe)
]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "reference_cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model stored in bfloat16."""
    return write_base(tmp_path_factory.mktemp("base") / "model", "bfloat16")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The same after four steps of SFT with float32 master weights, whose small updates bfloat16 would lose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "reference_cache"))
        workdir = tmp_path_factory.mktemp("tuned")
        command = ["--config=configs/tiny.py", f"--workdir={workdir}", *QUICK, *pretrained(base)]
        command += ["--config.objective.name=sft", "--config.max_steps=4", "--config.optimizer.warmup_steps=0"]
        command += ["--config.export.dtype=float32"]
        assert main(command) == 0
        return workdir / "policy"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs, for the recipes that read them."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"name {i}", "chosen": f"good {i} yes", "rejected": f"bad {i % 7}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"pairs": path, "thumbs": ROOT / "configs" / "tiny_feedback.jsonl"}


def pretrained(path):
    return [f"--config.model.path={path}", "--config.model.init=pretrained", "--config.model.param_dtype=float32"]


def first_row(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("recipe", CASES, ids=lambda recipe: recipe.stem)
def test_at_the_first_step_of_every_recipe_all_rewards_are_0_after_sft(recipe, tuned, data, tmp_path):
    own, tiny = resolved(recipe), resolved(ROOT / "configs" / "tiny.py")
    reads = check_objective(own.objective).reads
    model = dataclasses.replace(own.model, path=str(tuned), init="pretrained")
    feedback = dataclasses.replace(tiny.data, train=str(data[reads]), format=reads, holdout=0.0)
    small = dataclasses.replace(
        tiny, model=model, data=feedback, reference=own.reference, objective=own.objective, optimizer=own.optimizer,
        max_steps=1,
    )  # fmt: skip
    with Preemption() as preemption:
        assert train(small, tmp_path / "run", "none", preemption) == 0
    row = first_row(tmp_path / "run")
    wanted = {"rewards_desirable": 0, "rewards_undesirable": 0, "margin": 0, "auc": 0.5, "z0": 0, "kl": 0}
    assert {name: row[name] for name in wanted if name in row} == {name: wanted[name] for name in wanted if name in row}
    assert row["margin"] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reference"]["param_dtype"] == "float32"
    assert not (tmp_path / "run" / "reference_error.json").exists()


@pytest.mark.nightly
def test_rounding_what_sft_taught_is_refused_with_a_remedy_unless_the_error_is_accepted(tuned, tmp_path, capsys):
    command = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *QUICK, *pretrained(tuned)]
    command, rounded = [*command, "--config.objective.beta=0.5"], "--config.reference.param_dtype=bfloat16"
    assert main([*command, rounded, "--config.reference.max_error=0.0001"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "config.reference.param_dtype='bfloat16' moves the rewards of the first batch" in message
    assert 'Set config.reference.param_dtype to "auto"' in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # In the same folder, because the limit does not affect the numbers.
    command += ["--config.reference.max_error=1"]
    assert main([*command, rounded]) == 0
    errors = json.loads((tmp_path / "run" / "reference_error.json").read_text())
    assert errors["rewards_mean"] > 0.0001
    assert first_row(tmp_path / "run")["margin"] != 0
    assert "The rounded reference" in (tmp_path / "run" / "report.html").read_text()
    # A run is resumed with the dtype that it began with.
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reference"]["param_dtype"] == "bfloat16"


def test_a_bfloat16_reference_of_a_bfloat16_base_is_exact(base, tmp_path):
    command = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *QUICK, *pretrained(base)]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reference"]["param_dtype"] == "bfloat16"
    assert first_row(tmp_path / "run")["margin"] == 0
    assert not (tmp_path / "run" / "reference_error.json").exists()


@pytest.fixture
def model(tmp_path):
    """(path, dtype of its two tensors) -> a directory with weights and a config.json that says something else."""

    def make(*dtypes):
        weights = {f"w{i}": np.ones(4, jnp.dtype(dtype)) for i, dtype in enumerate(dtypes)}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
        return tmp_path

    return make


@pytest.mark.parametrize("dtypes, expected", [
    (("bfloat16", "bfloat16"), "bfloat16"), (("bfloat16", "float32"), "float32"), (("float16", "float16"), "float32"),
])  # fmt: skip
def test_the_stored_dtype_is_the_one_that_holds_every_tensor_exactly(model, dtypes, expected):
    assert stored_dtype(model(*dtypes)) == expected


@pytest.mark.parametrize("values, expected", [
    ({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "bfloat16"}, "bfloat16"), ({}, "float32"),
    ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"), ({"torch_dtype": "float16"}, "float32"),
])  # fmt: skip
def test_without_weights_config_json_states_the_dtype(tmp_path, values, expected):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert stored_dtype(tmp_path) == expected


def config(init="pretrained", path=str(TINY), **reference):
    model = ModelConfig(path=path, init=init, param_dtype=reference.pop("policy", "float32"))
    return Config(model=model, reference=ReferenceConfig(**reference))


@pytest.mark.parametrize("options, expected", [
    ({}, "float32"),
    ({"init": "random"}, "float32"),
    ({"init": "random", "policy": "bfloat16"}, "bfloat16"),
    ({"policy": "bfloat16"}, "bfloat16"),
    ({"path": PUBLISHED}, "bfloat16"),
    ({"path": PUBLISHED, "sync_every": 4}, "float32"),
    ({"path": PUBLISHED, "param_dtype": "int8"}, "int8"),
])  # fmt: skip
def test_auto_holds_the_policys_initial_weights_exactly(options, expected):
    assert choose_dtype(config(**options), only_config=True).reference.param_dtype == expected


def test_without_a_reference_or_adapters_there_is_no_dtype_to_choose():
    sft = dataclasses.replace(config(), objective=ObjectiveConfig(name="sft"))
    assert choose_dtype(sft) == sft
    assert choose_dtype(dataclasses.replace(sft, lora=LoraConfig(rank=4))).reference.param_dtype == "float32"
    assert not is_rounded(dataclasses.replace(sft, reference=ReferenceConfig(param_dtype="int8")))


def test_an_error_that_is_not_a_number_is_refused():
    with pytest.raises(ConfigError, match="by nan on average"):
        check_error(config(param_dtype="int8"), {"rewards_mean": float("nan")})
