"""Training low-rank adapters: the step on meshes, and whole runs."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from kto_jax.config import LoraConfig, MeshConfig, OptimizerConfig, resolve
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, place_batch, shardings
from kto_jax.models.lora import adapter_axes, init_adapters
from kto_jax.models.model import Model
from kto_jax.models.quantised import cast_params
from kto_jax.models.weights.load import load_params
from kto_jax.planning.compile_step import Lengths, compile_step, read_task
from kto_jax.planning.topology import open_topology
from kto_jax.train import main
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.state import create_state
from kto_jax.training.step import Recipe, jit_train_step
from kto_jax.training.stored_policy import load_checkpoint, load_policy
from tests import ROOT
from tests.training.test_step import CONFIG, OBJECTIVE, PACKED, make_schedule, parameters

LORA = LoraConfig(rank=4, alpha=6.0)
RUN = ["--config=configs/tiny.py", "--config.lora.rank=4", "--config.optimizer.learning_rate=1e-2"]
RUN += ["--config.max_steps=8", "--config.checkpoint.every=4", "--config.evaluation.every=4"]


def three_steps(mesh_config, num_devices, objective=OBJECTIVE, kept="float64", is_dense=True):
    """Metrics of three steps from adapters far from 0 on a frozen model, and the adapters after them."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = Model.create(
        CONFIG, dtype="float64", layout=make_layout(mesh), lora=LORA,
    )  # fmt: skip
    frozen = parameters("float64")[1]
    adapters = init_adapters(frozen, LORA, jax.random.key(2))
    adapters = jax.tree.map(
        lambda leaf: leaf.astype("float64") + 0.5 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), adapters
    )
    of_adapters = shardings(mesh, adapter_axes(model.logical_axes(), LORA), adapters)
    quantised = jax.jit(cast_params, static_argnums=1)(frozen, kept)
    frozen = jax.tree.map(lambda _, node: node.astype("float64"), frozen, quantised) if is_dense else quantised
    dtype = "float64" if is_dense else kept
    layout = shardings(mesh, model.logical_axes(dtype), model.abstract_params(dtype))
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    learning_rate = make_learning_rate(config, 3)
    optimizer = make_optimizer(config, learning_rate)
    state = create_state(jax.device_put(adapters, of_adapters), jax.device_put(frozen, layout), optimizer, mesh, {})
    step = jit_train_step(Recipe(model, objective, optimizer, learning_rate))
    batch, log = place_batch(mesh, make_schedule(*PACKED[2][:2])[1].batch(0)), []
    for _ in range(3):
        state, figures = step(state, batch)
        log.append([float(figures[name]) for name in ("loss", "z0", "grad_norm")])
    return np.array(log), jax.device_get(state.policy), jax.device_get(state.reference)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, sequence=4)])
def test_adapters_train_alike_on_every_mesh_and_frozen_weights_do_not_change(sizes):
    with jax.enable_x64(True):
        expected, policy, _ = three_steps(MeshConfig(), 1)
        got, policy_there, frozen = three_steps(sizes, 8)
        assert expected[0, 1] > 0.5  # z0 is not clamped
        assert expected[2, 0] < expected[0, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        difference = optax.tree.norm(jax.tree.map(np.subtract, policy, policy_there))
        assert difference < 1e-9 * optax.tree.norm(policy)
        jax.tree.map(np.testing.assert_array_equal, frozen, parameters("float64")[1])


@pytest.mark.slow
@pytest.mark.parametrize("kept", [pytest.param("nf4", marks=pytest.mark.nightly), "int4"])
def test_a_step_on_weights_in_four_bits_is_that_on_the_dequantised_weights_on_every_mesh(kept):
    with jax.enable_x64(True):
        expected, policy, _ = three_steps(MeshConfig(), 1, kept=kept)
        for sizes, num_devices in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)):
            got, policy_there, _ = three_steps(sizes, num_devices, kept=kept, is_dense=False)
            np.testing.assert_allclose(got, expected, rtol=1e-9)
            difference = optax.tree.norm(jax.tree.map(np.subtract, policy, policy_there))
            assert difference < 1e-9 * optax.tree.norm(policy)


@pytest.mark.slow
def test_the_step_needs_memory_for_adapters_and_no_gradient_of_the_weights():
    def parts(rank):
        config = resolve(
            {
                "model": {"path": str(ROOT / "configs/architectures/llama_3_2_1b"), "dtype": "float32"},
                "data": {"train": "feedback.jsonl", "max_length": 64, "max_prompt_length": 32},
                "lora": {"rank": rank}, "batch_size": 8, "mesh": {"data": 1, "fsdp": 8},
                "reference": {"param_dtype": "float32"},
            }
        )  # fmt: skip
        return compile_step(config, read_task(config), open_topology("local"), Lengths(64, 32))

    whole, adapters = parts(0), parts(8)
    weights = whole.parts["policy"]
    assert adapters.parts["reference"] == weights
    assert adapters.parts["policy"] < 0.03 * weights
    assert adapters.parts["moments"] < 0.06 * weights
    assert adapters.temporaries < whole.temporaries - 0.9 * weights
    assert adapters.flops == pytest.approx(5 / 6 * whole.flops, rel=0.01)


@pytest.fixture(autouse=True)
def in_place(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "lora_cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "lora_cache"))
        workdir = tmp_path_factory.mktemp("adapters") / "run"
        assert main([*RUN, f"--workdir={workdir}"]) == 0
        return workdir


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def figures(workdir):
    return [{name: row[name] for name in ("loss", "z0", "grad_norm", "margin")} for row in rows_of(workdir)]


def test_a_run_learns_and_writes_the_adapters_and_the_merged_policy(finished):
    log = figures(finished)
    assert (log[0]["loss"], log[0]["margin"]) == (0.5, 0.0)  # it starts as the reference
    assert log[-1]["margin"] > 0.3
    model, laid, _ = load_policy(finished)
    adapters = load_file(finished / "adapter" / "adapter_model.safetensors")
    policy = load_file(finished / "policy" / "model.safetensors")
    for theirs, (group, name) in {"self_attn.o_proj": ("attention", "output"), "mlp.up_proj": ("mlp", "up")}.items():
        a, b = (adapters[f"base_model.model.model.layers.1.{theirs}.lora_{part}.weight"] for part in "AB")
        assert np.abs(b).max() > 0
        frozen = np.asarray(laid["layers"][group][name]["weight"].frozen[1]).T
        np.testing.assert_allclose(policy[f"model.layers.1.{theirs}.weight"], frozen + 4 * b @ a, rtol=1e-5, atol=1e-6)
    # Sampling from a checkpoint uses the same policy as the export.
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    rows = np.ones_like(tokens), np.broadcast_to(np.arange(12, dtype=np.int32)[None], tokens.shape)
    exported = load_params(model, finished / "policy", param_dtype="float32")
    np.testing.assert_allclose(
        model.hidden_states(laid, tokens, *rows), model.hidden_states(exported, tokens, *rows), rtol=1e-4, atol=1e-4
    )
    assert json.loads((finished / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert (finished / "adapter" / "tokenizer.json").exists()
    assert "low-rank adapters of rank 4, alpha 16" in (finished / "policy" / "README.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for left in ("checkpoints/8", "policy", "adapter", "report.html"):
        path = workdir / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([*RUN, f"--workdir={workdir}"]) == 0
    assert figures(workdir) == figures(finished)
    for name in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("arguments", [
    ["--config.reference.param_dtype=int8", "--config.reference.precompute=True", "--config.lora.zero=a"],
    ["--config.reference.param_dtype=nf4"], ["--config.objective.name=ppo_offline"],
    ["--config.lora.dora=True", "--config.lora.dropout=0.1", "--config.lora.rank_stabilised=True",
     "--config.lora.rank_pattern=q_proj=2", "--config.lora.modules_to_save=embedding"],
    *(pytest.param(arguments, marks=pytest.mark.exhaustive) for arguments in (
        ["--config.reference.param_dtype=bfloat16", "--config.lora.targets=query,value"],
        ["--config.objective.name=reward"], ["--config.objective.name=orpo"],
    )),
])  # fmt: skip
def test_adapters_work_with_every_dtype_of_frozen_weights_and_every_head(arguments, tmp_path):
    assert main([*RUN, *arguments, f"--workdir={tmp_path / 'run'}"]) == 0
    log = rows_of(tmp_path / "run")
    assert log[-1]["margin"] > log[0]["margin"]
    # Rounding undoes nothing that was learnt.
    assert json.loads((tmp_path / "run/policy/config.json").read_text())["torch_dtype"] == "float32"
    stored = load_checkpoint(tmp_path / "run")[1]
    exported = load_params(stored.model, tmp_path / "run/policy", param_dtype="float32")
    values = [params["layers"]["attention"]["value"]["weight"] for params in (stored.policy, exported)]
    ours, theirs = (weight.astype("float32") for weight in values)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    said = "rounded to" in (tmp_path / "run/adapter/README.md").read_text()
    assert said == any("param_dtype" in argument for argument in arguments)
