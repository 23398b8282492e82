"""Frozen weights in nf4 and int4: their contents, their sharding, their loading, and adapters on them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import ConfigError, LoraConfig, MeshConfig
from kto_jax.devices.sharding import constrainer, make_mesh, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.four_bits import NF4_LEVELS, Int4Matrix, Nf4Matrix, quantise_int4, quantise_nf4
from kto_jax.models.layout import Layout
from kto_jax.models.lora import AdaptedMatrix, Adapter, init_adapters, merge_adapters
from kto_jax.models.model import Model
from kto_jax.models.quantised import QUANTISED, cast_params, quantise
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params
from tests.models.conftest import decode, draw_params, draw_tokens, hidden_states, whole_rows

TOKENS = draw_tokens(0, 4, 16)
KINDS = ["nf4", "int4"]


def as_bitsandbytes(weight_OI):
    """The bytes and the scales that bitsandbytes keeps of a matrix as PyTorch stores it, computed weight by weight."""
    packed, scales, middles = [], [], [(low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS)]
    for block in weight_OI.reshape(-1, 64):
        scales.append(np.abs(block).max())
        codes = [sum(float(weight / (scales[-1] or 1)) > middle for middle in middles) for weight in block]
        packed += [upper << 4 | lower for upper, lower in zip(codes[::2], codes[1::2], strict=True)]
    return np.array(packed, np.uint8), np.array(scales, np.float32)


def test_nf4_has_the_bytes_and_the_values_of_bitsandbytes():
    weight_OI = np.random.default_rng(0).normal(size=(6, 192)).astype(np.float32)
    weight_OI[2, 64:128] = 0
    kept = quantise_nf4(jnp.asarray(weight_OI.T))
    packed, scales = as_bitsandbytes(weight_OI)
    assert (kept.nf4.dtype, kept.nf4.shape, kept.scales.shape) == (jnp.uint8, (96, 6), (3, 6))
    np.testing.assert_array_equal(kept.nf4.T.reshape(-1), packed)
    np.testing.assert_array_equal(kept.scales.T.reshape(-1), scales)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, 64)
    values = np.asarray(NF4_LEVELS, np.float32)[codes] * scales[:, None]
    np.testing.assert_array_equal(kept.astype("float32"), values.reshape(6, 192).T)
    np.testing.assert_array_equal(kept.astype("bfloat16"), values.reshape(6, 192).T.astype(jnp.bfloat16))
    # Weights that are in nf4 already stay what they are.
    jax.tree.map(np.testing.assert_array_equal, quantise_nf4(kept.astype("float32")), kept)


def test_int4_rounds_each_block_to_multiples_of_a_seventh_of_its_largest_weight():
    weights = np.random.default_rng(0).normal(size=(3, 128, 5)).astype(np.float32) * 10.0 ** np.arange(5)
    kept = quantise_int4(jnp.asarray(weights, jnp.float32))
    blocks = weights.reshape(3, 2, 64, 5).astype(np.float32)
    np.testing.assert_allclose(kept.scales, np.abs(blocks).max(axis=2) / 7, rtol=1e-6)
    integers = np.asarray(kept.astype("float32")).reshape(blocks.shape) / np.asarray(kept.scales)[:, :, None]
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-5)
    np.testing.assert_array_equal(np.abs(integers).max(axis=2).round(), np.full((3, 2, 5), 7))  # -8 is not used
    assert np.all(np.abs(kept.astype("float32") - weights) <= 0.501 * np.repeat(kept.scales, 64, axis=1))
    assert kept.int4.shape == (3, 64, 5)


@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int4])
def test_a_block_is_a_power_of_two_that_divides_the_input_and_an_odd_input_is_refused(quantise):
    assert quantise(jnp.ones((96, 3))).scales.shape == (3, 3)
    np.testing.assert_allclose(quantise(jnp.full((6, 3), 2.0)).astype("float32"), 2.0, rtol=1e-6)
    with pytest.raises(ConfigError, match=r'input of 7.*four bits.*even sizes\. Set .*"int8"'):
        quantise(jnp.ones((7, 3)))


def test_the_structures_of_trees_tell_what_their_matrices_are_made_of():
    """A program that was compiled for one of them is of no use to another, though the shapes are the same."""
    weights = jnp.ones((64, 64))
    kept = [quantise(weights, kind, -2) for kind in QUANTISED]
    adapter = Adapter(weights, weights)
    matrices = [weights, *kept, *(AdaptedMatrix(each, adapter, 2.0) for each in (weights, *kept))]
    structures = [jax.tree.structure(each) for each in matrices]
    assert not [pair for pair in itertools.combinations(structures, 2) if pair[0] == pair[1]]


def dequantised(kept, like):
    """The same weights as float32 arrays, leaf by leaf."""
    nodes = jax.tree.map(lambda _, node: node, like, kept)
    return jax.tree.map(lambda leaf, node: node.astype(leaf.dtype), like, nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_and_decoding_are_those_of_the_dequantised_weights(kind, model, params):
    kept, rows = cast_params(params, kind), whole_rows(TOKENS)
    got = hidden_states(model, kept, TOKENS, *rows)
    np.testing.assert_allclose(got, hidden_states(model, dequantised(kept, params), TOKENS, *rows), atol=1e-5)
    assert np.max(np.abs(got - hidden_states(model, params, TOKENS, *rows))) > 1e-2
    prompt = jnp.asarray(TOKENS[:, :4]), jnp.tile(jnp.arange(4), (4, 1))
    decoded, _ = decode(model, kept, model.init_cache(4, 8), *prompt)
    np.testing.assert_allclose(decoded, got[:, :4], atol=1e-4)
    assert kept["embed"]["table"].dtype == kept["head"]["weight"].dtype == jnp.bfloat16
    assert kept["final_norm"]["scale"].dtype == jnp.float32


def test_matrices_are_dequantised_layer_by_layer(model, params):
    tokens = draw_tokens(0, 3, 7)
    jaxpr = jax.make_jaxpr(model.hidden_states)(cast_params(params, "nf4"), tokens, *whole_rows(tokens))
    wide = params["layers"]["mlp"]["gate"]["weight"].shape
    assert not [one for one in jaxpr.eqns for out in one.outvars if out.aval.shape == wide]


def test_gradients_of_adapters_are_those_on_the_dequantised_weights(model, params):
    lora, rows = LoraConfig(rank=3, alpha=4.0, dora=True), whole_rows(TOKENS)
    kept = cast_params(params, "nf4")
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, init_adapters(params, lora, jax.random.key(1)))

    def gradient(frozen):
        def loss(adapters):
            laid = merge_adapters(frozen, adapters, lora)
            return jnp.sum(model.token_logps(laid, model.hidden_states(laid, TOKENS, *rows), jnp.asarray(TOKENS)))

        return jax.jit(jax.grad(loss))(adapters)

    got, expected = gradient(kept), gradient(dequantised(kept, params))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3), got, expected)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(got)) > 0


CONFIG = TransformerConfig(
    vocab_size=64, embed_dim=192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=128,
    initializer_range=0.05, bos_id=1, eos_ids=(2,),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("nf4", MeshConfig(data=1, fsdp=4, tensor=2)),
        pytest.param("int4", MeshConfig(data=8), marks=pytest.mark.nightly),
    ],
)
def test_four_bits_are_loaded_matrix_by_matrix_onto_any_mesh(kind, sizes, tmp_path):
    model = Model.create(CONFIG, remat="none")
    params = draw_params(model)
    save_hugging_face(tmp_path / "m", model, params, tokenizer_dir=None, model_card="")
    mesh = make_mesh(sizes)
    spread = Model.create(CONFIG, remat="none", layout=Layout(constrain=constrainer(mesh)))
    layout = shardings(mesh, spread.logical_axes(kind), spread.abstract_params(kind))
    kept = load_params(model, tmp_path / "m", param_dtype=kind, shardings=layout)
    jax.tree.map(np.testing.assert_array_equal, kept, cast_params(params, kind))
    assert jax.tree.map(lambda leaf: leaf.sharding, kept) == layout
    gate = kept["layers"]["mlp"]["gate"]["weight"]
    assert isinstance(gate, Nf4Matrix if kind == "nf4" else Int4Matrix)
    # 96 bytes of an input are split over 4 devices; its 3 scales cannot be, and are whole on each.
    assert gate.codes.sharding.shard_shape(gate.codes.shape) == (2, 96 // sizes.fsdp, 128 // sizes.tensor)
    assert gate.scales.sharding.shard_shape(gate.scales.shape) == (2, 3, 128 // sizes.tensor)
    tokens = draw_tokens(0, 8, 16)
    expected = hidden_states(model, cast_params(params, kind), tokens, *whole_rows(tokens))
    np.testing.assert_allclose(hidden_states(spread, kept, tokens, *whole_rows(tokens)), expected, atol=1e-4)
