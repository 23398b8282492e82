"""Low-rank adapters: forward pass, gradients, and the directory for peft."""

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from kto_jax.config import LORA_MATRICES, LoraConfig
from kto_jax.models.lora import (
    AdaptedMatrix,
    Adapter,
    DoraAdapter,
    DroppedMatrix,
    adapter_axes,
    init_adapters,
    merge_adapters,
    with_magnitudes,
)
from kto_jax.models.model import Model
from kto_jax.models.quantised import cast_params
from kto_jax.models.transformer import Linear
from kto_jax.models.weights.peft import save_adapters
from tests.models.conftest import draw_tokens, hidden_states, whole_rows

TOKENS = draw_tokens(0, 4, 16)
LORA = LoraConfig(rank=3, alpha=4.0)
SCALE = 4 / 3


def drawn(params, lora=LORA, size=0.3):
    """Adapters with nonzero A and B."""
    adapters = init_adapters(params, lora, jax.random.key(1))
    noise = lambda path, leaf: size * jax.random.normal(jax.random.key(zlib.crc32(str(path).encode())), leaf.shape)  # noqa: E731
    return jax.tree_util.tree_map_with_path(noise, adapters)


def merged(params, adapters, lora=LORA):
    """The merged parameters as arrays."""

    def one(node):
        return node.astype("float32") if isinstance(node, AdaptedMatrix) else node

    laid = merge_adapters(params, adapters, lora)
    return jax.tree.map(one, laid, is_leaf=lambda node: isinstance(node, AdaptedMatrix))


@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_policy_starts_bitwise_equal_to_the_frozen_model_and_can_change(zero, model, params):
    lora = LoraConfig(rank=3, zero=zero)
    adapters = init_adapters(params, lora, jax.random.key(0))
    laid, rows = merge_adapters(params, adapters, LORA), whole_rows(TOKENS)
    np.testing.assert_array_equal(
        hidden_states(model, laid, TOKENS, *rows), hidden_states(model, params, TOKENS, *rows)
    )
    gradient = jax.grad(
        lambda adapters: jnp.sum(hidden_states(model, merge_adapters(params, adapters, LORA), TOKENS, *rows))
    )
    other = {"a": "b", "b": "a"}[zero]
    for group in gradient(adapters)["layers"].values():
        for pair in group.values():
            assert np.all(np.any(getattr(pair["weight"], zero) != 0, axis=(1, 2)))
            assert np.all(getattr(pair["weight"], other) == 0)  # until the first matrix has moved


@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_policy_with_magnitudes_starts_as_the_frozen_model(zero, model, params):
    lora, rows = LoraConfig(rank=3, zero=zero, dora=True), whole_rows(TOKENS)
    adapters = with_magnitudes(init_adapters(params, lora, jax.random.key(0)), params)
    got = hidden_states(model, merge_adapters(params, adapters, lora), TOKENS, *rows)
    np.testing.assert_allclose(got, hidden_states(model, params, TOKENS, *rows), rtol=1e-4, atol=1e-4)
    magnitude = adapters["layers"]["mlp"]["down"]["weight"].magnitude
    np.testing.assert_allclose(
        magnitude, np.linalg.norm(params["layers"]["mlp"]["down"]["weight"], axis=1), rtol=1e-6
    )  # fmt: skip


@pytest.mark.parametrize(
    "kept", ["float32", "nf4", *(pytest.param(kept, marks=pytest.mark.nightly) for kept in ("int8", "int4"))]
)
def test_with_dora_the_weights_of_an_output_have_its_magnitude_as_their_norm(kept, model, params):
    lora, rows = dataclasses.replace(LORA, dora=True), whole_rows(TOKENS)
    frozen, adapters = cast_params(params, kept), drawn(params, lora)
    laid = merge_adapters(frozen, adapters, lora)
    matrix, pair = laid["layers"]["attention"]["query"]["weight"].astype("float32"), None
    pair = adapters["layers"]["attention"]["query"]["weight"]
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), np.abs(pair.magnitude), rtol=1e-5)
    got = hidden_states(model, laid, TOKENS, *rows)
    np.testing.assert_allclose(
        got, hidden_states(model, merged(frozen, adapters, lora), TOKENS, *rows), rtol=1e-4, atol=1e-4
    )  # fmt: skip


def test_the_norm_in_dora_has_no_gradient():
    """Of y = m / |w + ab| (w + ab) the gradient of b is that of the sum alone, times m / |w + ab|."""
    linear = Linear((2, 1), ("embed", "mlp"), scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(linear)
    weight = AdaptedMatrix(
        jnp.array([[3.0], [0.0]]), DoraAdapter(jnp.array([[0.0], [1.0]]), jnp.array([[4.0]]), jnp.array([10.0])), 1.0
    )  # fmt: skip

    def output(weight):
        linear = nnx.merge(graphdef, nnx.State({"weight": weight}))
        return linear(jnp.array([[1.0, 1.0]]))[0, 0]

    value, gradient = jax.value_and_grad(output)(weight)
    assert value == pytest.approx(10 / 5 * 7)
    assert gradient.adapter.b[0, 0] == pytest.approx(10 / 5)
    assert gradient.adapter.magnitude[0] == pytest.approx(7 / 5)


def test_dropout_falls_on_the_input_of_adapters_alone_and_only_with_a_key(model, params):
    lora, rows = dataclasses.replace(LORA, dropout=0.5), whole_rows(TOKENS)
    adapters = drawn(params)

    def states(key, adapters=adapters):
        return hidden_states(model, merge_adapters(params, adapters, lora, key), TOKENS, *rows)

    np.testing.assert_array_equal(
        states(None), hidden_states(model, merge_adapters(params, adapters, LORA), TOKENS, *rows)
    )
    first, second = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(states(first), states(first))
    assert np.abs(states(first) - states(second)).max() > 0.1
    empty = init_adapters(params, LORA, jax.random.key(0))
    np.testing.assert_array_equal(states(first, empty), hidden_states(model, params, TOKENS, *rows))
    matrix = DroppedMatrix(None, Adapter(None, None), 1.0, 0.25, first)
    dropped = matrix.dropped(jnp.ones((100, 100)))
    assert float(jnp.mean(dropped == 0)) == pytest.approx(0.25, abs=0.02)
    assert float(jnp.max(dropped)) == pytest.approx(4 / 3)


def test_each_matrix_has_its_own_rank_and_scale(params):
    lora = LoraConfig(rank=4, alpha=8.0, rank_pattern=("value=2",), alpha_pattern=("down=3",), rank_stabilised=True)
    adapters = init_adapters(params, lora, jax.random.key(0))["layers"]
    assert adapters["attention"]["value"]["weight"].a.shape == (2, 32, 2)
    assert adapters["attention"]["query"]["weight"].a.shape == (2, 32, 4)
    laid = merge_adapters(params, {"layers": adapters}, lora)["layers"]
    assert laid["attention"]["value"]["weight"].scale == 8 / 2**0.5
    assert (laid["attention"]["query"]["weight"].scale, laid["mlp"]["down"]["weight"].scale) == (4.0, 1.5)


@pytest.mark.parametrize(
    "kept", ["int8", "nf4", *(pytest.param(kept, marks=pytest.mark.nightly) for kept in ("float32", "int4"))]
)
def test_the_forward_pass_equals_that_of_the_merged_matrices(kept, model, params):
    frozen = cast_params(params, kept)
    adapters, rows = drawn(params), whole_rows(TOKENS)
    got = hidden_states(model, merge_adapters(frozen, adapters, LORA), TOKENS, *rows)
    expected = hidden_states(model, merged(frozen, adapters), TOKENS, *rows)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(got - hidden_states(model, params, TOKENS, *rows))) > 0.1
    whole = params["layers"]["mlp"]["gate"]["weight"] if kept == "float32" else None
    if whole is not None:
        pair = adapters["layers"]["mlp"]["gate"]["weight"]
        by_numpy = np.asarray(whole) + SCALE * np.asarray(pair.a) @ np.asarray(pair.b)
        np.testing.assert_allclose(
            merged(frozen, adapters)["layers"]["mlp"]["gate"]["weight"], by_numpy, rtol=1e-5, atol=1e-6
        )


def test_gradients_are_the_merged_matrixs_gradient_times_the_other_factor(config):
    """dA = α/r · dW Bᵀ and dB = α/r · Aᵀ dW, dW the gradient of the sum."""
    with jax.enable_x64(True):
        model, rows = Model.create(config, dtype="float64"), whole_rows(TOKENS)
        params = model.init_params(jax.random.key(0), "float64")
        adapters = jax.tree.map(lambda leaf: leaf.astype("float64"), drawn(params))

        def loss(params):
            return jnp.sum(model.token_logps(params, model.hidden_states(params, TOKENS, *rows), jnp.asarray(TOKENS)))

        whole = jax.tree.map(lambda leaf: leaf, params)  # its dictionaries are new
        for group, names in adapters["layers"].items():
            for name, pair in names.items():
                a, b = pair["weight"].a, pair["weight"].b
                whole["layers"][group][name]["weight"] += SCALE * (a @ b)
        of_whole = jax.device_get(jax.jit(jax.grad(loss))(whole))
        of_adapters = jax.jit(jax.grad(lambda adapters: loss(merge_adapters(params, adapters, LORA))))(adapters)
        of_adapters = jax.device_get(of_adapters)
        for group, names in jax.device_get(adapters)["layers"].items():
            for name, pair in names.items():
                a, b, dw = pair["weight"].a, pair["weight"].b, of_whole["layers"][group][name]["weight"]
                got = of_adapters["layers"][group][name]["weight"]
                np.testing.assert_allclose(got.a, SCALE * dw @ b.transpose(0, 2, 1), rtol=1e-9, atol=1e-11)
                np.testing.assert_allclose(got.b, SCALE * a.transpose(0, 2, 1) @ dw, rtol=1e-9, atol=1e-11)


def test_only_the_chosen_matrices_have_adapters_and_each_has_its_axes(model, params):
    lora = LoraConfig(rank=5, targets=("value", "down"))
    adapters, axes = init_adapters(params, lora, jax.random.key(0)), adapter_axes(model.logical_axes(), lora)
    shapes = jax.tree.map(lambda leaf: leaf.shape, adapters)
    assert shapes == {
        "layers": {
            "attention": {"value": {"weight": Adapter((2, 32, 5), (2, 5, 16))}},
            "mlp": {"down": {"weight": Adapter((2, 48, 5), (2, 5, 32))}},
        }
    }
    assert axes["layers"]["mlp"]["down"]["weight"] == Adapter(
        ("layers", "mlp", "adapter"), ("layers", "adapter", "embed")
    )
    assert np.abs(adapters["layers"]["mlp"]["down"]["weight"].a).max() == pytest.approx(48**-0.5, rel=0.05)


@pytest.mark.parametrize("head", ["none", "reward", "value"])
def test_the_directory_for_peft_names_every_tensor_as_peft_does(head, config, params, tmp_path):
    model = Model.create(config, scalar_head=head)
    adapters = drawn(params)
    if head != "none":
        adapters |= {"scorer": model.init_params(jax.random.key(0), "float32")["scorer"]}
    for _ in range(2):  # An earlier export is replaced.
        save_adapters(
            tmp_path / "adapter",
            model,
            adapters,
            lora=LORA,
            base="org/base@v1",
            tokenizer_dir="configs/tiny_model",
            model_card="card",
        )
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (3, 4.0, "org/base")
    assert values["revision"] == "v1"
    assert (tmp_path / "adapter" / "README.md").read_text() == "card"
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    pair = adapters["layers"]["mlp"]["down"]["weight"]
    np.testing.assert_array_equal(tensors.pop(name.format("A")), pair.a[1].T)
    np.testing.assert_array_equal(tensors.pop(name.format("B")), pair.b[1].T)
    if head == "reward":
        np.testing.assert_array_equal(tensors.pop("base_model.model.score.weight"), adapters["scorer"]["weight"][None])
    assert (values["task_type"], values["modules_to_save"]) == (
        ("SEQ_CLS", ["score"]) if head == "reward" else ("CAUSAL_LM", None)
    )
    assert len(tensors) == 2 * 2 * len(LORA_MATRICES) - 2
    assert set(values["target_modules"]) == {name.split(".")[-3] for name in tensors}
