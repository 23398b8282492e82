"""Gradients of mixed precision: accumulated in float32, and reduced over devices in the configured dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import MeshConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.gradients import repeat_rows, wide_gradient_product
from kto_jax.models.model import Model

CONFIG = TransformerConfig(
    vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_head=True,
    qkv_bias=True,
)  # fmt: skip
ROWS, LENGTH = 16, 32


def draw(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def test_a_product_in_bfloat16_gives_the_gradient_of_its_weight_in_float32():
    x, weight, cotangent = draw(0, 256, 8).astype(jnp.bfloat16), draw(1, 8, 4), draw(2, 256, 4).astype(jnp.bfloat16)
    product, backward = jax.vjp(wide_gradient_product, x, weight)
    expected, plain = jax.vjp(lambda x, weight: x @ weight.astype(jnp.bfloat16), x, weight)
    np.testing.assert_array_equal(product, expected)
    (of_x, of_weight), (of_x_plain, of_weight_plain) = backward(cotangent), plain(cotangent)
    np.testing.assert_array_equal(of_x, of_x_plain)
    exact = np.float64(x).T @ np.float64(cotangent)
    assert of_weight.dtype == jnp.float32
    np.testing.assert_allclose(of_weight, exact, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(of_weight_plain - exact)) > 0.01


def test_a_narrow_weight_has_a_gradient_of_its_own_dtype():
    x, weight = draw(0, 6, 8).astype(jnp.bfloat16), draw(1, 8, 4).astype(jnp.bfloat16)
    gradient = jax.grad(lambda weight: wide_gradient_product(x, weight).astype(jnp.float32).sum())(weight)
    assert gradient.dtype == jnp.bfloat16


def test_the_gradient_of_a_bias_is_summed_over_tokens_in_float32():
    count = 1000
    cotangent = jnp.full((count, 3), 1.0078125, jnp.bfloat16)
    rows, backward = jax.vjp(lambda row: repeat_rows(row, count, jnp.bfloat16), draw(0, 3))
    assert rows.shape == (count, 3)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_allclose(backward(cotangent)[0], np.full(3, 1.0078125 * count), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_head_is_not_rounded_to_bfloat16(tied):
    model = Model.create(dataclasses.replace(CONFIG, tied_head=tied), dtype="bfloat16")
    params = model.init_params(jax.random.key(0), "float32")
    hidden, targets = draw(1, 2, 40, CONFIG.embed_dim).astype(jnp.bfloat16), jnp.ones((2, 40), jnp.int32)
    part, name = ("embed", "table") if tied else ("head", "weight")
    found = jax.grad(lambda params: model.token_logps(params, hidden, targets).sum())(params)[part][name]
    wide = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    exact = Model.create(model.config)
    expected = jax.grad(lambda params: exact.token_logps(params, hidden.astype(jnp.float32), targets).sum())(wide)
    # The products read logits' gradients that are rounded to bfloat16; their sum is not rounded again.
    np.testing.assert_allclose(found, expected[part][name], rtol=0.01, atol=0.05)
    assert np.mean(found != found.astype(jnp.bfloat16).astype(jnp.float32)) > 0.9


def gradient(mesh_config, num_devices, reduce_dtype):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = Model.create(CONFIG, dtype="bfloat16", layout=make_layout(mesh, "auto", reduce_dtype))
    params = Model.create(CONFIG).init_params(jax.random.key(0), "float32")
    params = jax.device_put(params, shardings(mesh, model.logical_axes(), model.abstract_params("float32")))
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, CONFIG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)

    def loss(params):
        hidden = model.hidden_states(params, tokens, jnp.ones_like(tokens), positions)
        return -jnp.mean(model.token_logps(params, hidden[:, :-1], tokens[:, 1:]))

    return jax.device_get(jax.jit(jax.grad(loss))(params))


@pytest.fixture(scope="module")
def on_one_device():
    return gradient(MeshConfig(), 1, "float32")


def error(mesh_config, reduce_dtype, expected):
    """The largest relative error of the gradients of the feed-forward layers' matrices, by norm."""
    leaves = zip(
        jax.tree.leaves(gradient(mesh_config, 8, reduce_dtype)["layers"]["mlp"]),
        jax.tree.leaves(expected["layers"]["mlp"]),
        strict=True,
    )
    return max(np.linalg.norm(got - leaf) / np.linalg.norm(leaf) for got, leaf in leaves)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1, fsdp=8), pytest.param(MeshConfig(data=2, fsdp=4), marks=pytest.mark.nightly)]
)
def test_gradients_summed_in_float32_are_those_of_one_device_and_in_bfloat16_are_rounded(mesh, on_one_device):
    assert error(mesh, "float32", on_one_device) < 1e-5
    assert error(mesh, "bfloat16", on_one_device) > 2e-3


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, sequence=4)])
def test_meshes_that_also_split_sums_of_the_forward_pass_are_closer_in_float32(mesh, on_one_device):
    # The terms of those sums are bfloat16 activations: 6e-4 and 1.5e-3 here, whatever the dtype of the reduction.
    assert error(mesh, "float32", on_one_device) < 2e-3 < error(mesh, "bfloat16", on_one_device)
