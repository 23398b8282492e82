"""A reference in int8: its contents, its error, its sharding and its loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import MeshConfig
from kto_jax.devices.sharding import constrainer, make_mesh, shardings
from kto_jax.models.int8 import Int8Matrix, quantise_int8
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model
from kto_jax.models.quantised import cast_params
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params
from tests.models.conftest import decode, draw_tokens, hidden_states, whole_rows

TOKENS = draw_tokens(0, 4, 16)


def test_the_error_of_a_weight_is_at_most_half_its_channels_scale():
    weight = jax.random.normal(jax.random.key(0), (3, 20, 8)) * jnp.logspace(-3, 3, 8)[None, None]
    weight = weight.at[:, :, 3].set(0)
    kept = quantise_int8(weight, -2)
    assert (kept.int8.dtype, kept.scales.shape) == (jnp.int8, (3, 8))
    error = jnp.abs(kept.astype("float32") - weight)
    assert np.all(error <= 0.501 * kept.scales[:, None])
    np.testing.assert_allclose(kept.scales, np.max(np.abs(weight), axis=1) / 127, rtol=1e-6)
    largest = np.abs(kept.int8.astype("int32")).max(axis=1)  # symmetric: -128 is not used
    np.testing.assert_array_equal(largest, np.broadcast_to(np.where(np.arange(8) == 3, 0, 127)[None], (3, 8)))


def dequantised(kept, like):
    """The same weights as arrays, leaf by leaf."""
    nodes = jax.tree.map(lambda _, node: node, like, kept)
    return jax.tree.map(lambda leaf, node: node.astype(leaf.dtype), like, nodes)


def test_the_forward_pass_is_that_of_the_dequantised_weights(model, params):
    kept = cast_params(params, "int8")
    whole, segments_positions = dequantised(kept, params), whole_rows(TOKENS)
    expected = hidden_states(model, whole, TOKENS, *segments_positions)
    got = hidden_states(model, kept, TOKENS, *segments_positions)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(model.head(kept), model.head(whole))
    assert np.max(np.abs(got - hidden_states(model, params, TOKENS, *segments_positions))) > 1e-3
    prompt = jnp.asarray(TOKENS[:, :4]), jnp.tile(jnp.arange(4), (4, 1))
    decoded, _ = decode(model, kept, model.init_cache(4, 8), *prompt)
    np.testing.assert_allclose(decoded, got[:, :4], atol=1e-4)


def test_a_token_outside_of_the_vocabulary_is_nan_in_int8_too(model, params):
    tokens = TOKENS.copy()
    tokens[1, 0] = 64
    hidden = hidden_states(model, cast_params(params, "int8"), tokens, *whole_rows(tokens))
    assert np.isnan(hidden[1]).all()
    assert np.isfinite(hidden[0]).all()


@pytest.mark.parametrize("head", ["reward", "value"])
def test_reward_and_value_heads_are_not_quantised(head, config):
    model = Model.create(config, scalar_head=head)
    abstract = model.abstract_params("int8")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract["scorer"])} == {"float32"}
    assert isinstance(abstract["embed"]["table"], Int8Matrix)
    shardings(make_mesh(MeshConfig(fsdp=8)), model.logical_axes("int8"), abstract)


def test_matrices_are_dequantised_layer_by_layer(model, params):
    tokens = draw_tokens(0, 3, 7)
    jaxpr = jax.make_jaxpr(model.hidden_states)(cast_params(params, "int8"), tokens, *whole_rows(tokens))
    wide = {params["layers"]["mlp"]["gate"]["weight"].shape, params["embed"]["table"].shape}
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            assert out.aval.shape not in wide or out.aval.dtype == jnp.int8, equation


@pytest.mark.parametrize("sizes", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)], ids=["4x2", "8"])
def test_int8_is_loaded_matrix_by_matrix_onto_any_mesh(sizes, model, params, tmp_path):
    save_hugging_face(tmp_path / "m", model, params, tokenizer_dir=None, model_card="")
    mesh = make_mesh(sizes)
    spread = Model.create(model.config, remat="none", layout=Layout(constrain=constrainer(mesh)))
    layout = shardings(mesh, spread.logical_axes("int8"), spread.abstract_params("int8"))
    kept = load_params(model, tmp_path / "m", param_dtype="int8", shardings=layout)
    jax.tree.map(np.testing.assert_array_equal, kept, cast_params(params, "int8"))
    assert jax.tree.map(lambda leaf: leaf.sharding, kept) == layout
    tokens = draw_tokens(0, 8, 16)  # as many rows as data × fsdp, as in training
    expected = hidden_states(model, cast_params(params, "int8"), tokens, *whole_rows(tokens))
    np.testing.assert_allclose(hidden_states(spread, kept, tokens, *whole_rows(tokens)), expected, atol=1e-4)
