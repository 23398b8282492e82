import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import LoraConfig
from kto_jax.models.dispatch import run_experts
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.lora import AdaptedMatrix, Adapter, merge_adapters
from kto_jax.models.model import Model
from kto_jax.models.quantised import cast_params
from kto_jax.models.unstacked import transpose_layers
from tests.models.conftest import decode, draw_tokens, hidden_states, whole_rows
from tests.models.families.family_files import FILES

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
TOKENS, EMBED, WIDTH, EXPERTS = 30, 6, 5, 4
run = jax.jit(run_experts, static_argnums=4)


@pytest.fixture(scope="module")
def layer():
    """Tokens, their experts and shares, and the experts' matrices."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(0, 1, shape).astype("f")  # noqa: E731
    sizes = {"gate": (EMBED, WIDTH), "up": (EMBED, WIDTH), "down": (WIDTH, EMBED)}
    chosen = np.stack([random.permutation(EXPERTS)[:2] for _ in range(TOKENS)]).astype(np.int32)
    shares = random.uniform(0, 1, chosen.shape).astype("f")
    return draw(TOKENS, EMBED), chosen, shares, {name: draw(EXPERTS, *size) for name, size in sizes.items()}


def by_token(x, chosen, shares, matrices):
    """The same with a loop over tokens; an expert past the last is none."""
    out = np.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(chosen[token], shares[token], strict=True):
            if expert < EXPERTS:
                gate, up, down = (matrices[name][expert] for name in ("gate", "up", "down"))
                out[token] += share * (np.maximum(x[token] @ gate, 0) * (x[token] @ up)) @ down
    return out


def test_each_token_gets_the_sum_of_its_experts(layer):
    close(run(*layer, jax.nn.relu), by_token(*layer))


def test_no_token_is_dropped_if_all_choose_the_same_expert(layer):
    x, chosen, shares, matrices = layer
    same = np.full_like(chosen, 2)
    close(run(x, same, shares, matrices, jax.nn.relu), by_token(x, same, shares, matrices))


def test_a_token_without_experts_gets_zero_and_changes_no_other(layer):
    x, chosen, shares, matrices = layer
    none = np.where(np.arange(TOKENS)[:, None] % 3 == 0, EXPERTS, chosen).astype(np.int32)
    got = run(x, none, shares, matrices, jax.nn.relu)
    assert not got[::3].any()
    close(got, by_token(x, none, shares, matrices))


def test_adapters_of_experts_are_added_to_their_matrices(layer):
    x, chosen, shares, matrices = layer
    random = np.random.default_rng(1)
    factor = lambda *shape: jnp.asarray(random.normal(0, 1, (EXPERTS, *shape)), "f")  # noqa: E731
    adapted, summed = {}, {}
    for name, matrix in matrices.items():
        pair = Adapter(factor(matrix.shape[1], 2), factor(2, matrix.shape[2]))
        adapted[name] = AdaptedMatrix(jnp.asarray(matrix), pair, 0.5)
        summed[name] = np.asarray(adapted[name].astype("float32"))
    close(run(x, chosen, shares, adapted, jax.nn.relu), by_token(x, chosen, shares, summed), atol=1e-3)


# ------------------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def mixture():
    """A Qwen3-MoE whose routers decide clearly."""
    model = Model.create(read_config_json(FILES["qwen3_moe"]), remat="none")
    return model, jax.jit(model.init_params, static_argnums=1)(jax.random.key(0), "float32")


def test_padding_is_not_counted_and_does_not_change_the_tokens(mixture):
    model, params = mixture
    tokens = draw_tokens(0, 2, 12)
    segments = np.where(np.arange(12) < 9, 1, 0)[None].repeat(2, axis=0)
    route = jax.jit(model.route)
    hidden, routed = route(params, tokens, segments, whole_rows(tokens)[1])
    other = np.where(segments > 0, tokens, (tokens + 7) % 64)
    hidden_too, routed_too = route(params, other, segments, whole_rows(tokens)[1])
    np.testing.assert_array_equal(hidden[:, :9], hidden_too[:, :9])
    jax.tree.map(np.testing.assert_array_equal, routed, routed_too)
    layers, experts, per_token = 3, 8, 3
    assert routed.counts.shape == (layers, experts)
    np.testing.assert_array_equal(jnp.sum(routed.counts, axis=1), [18 * per_token] * layers)
    close(jnp.sum(routed.probabilities, axis=1), [18.0] * layers)
    assert np.all(routed.entropies > 0) and np.all(routed.entropies < 18 * np.log(experts))


@pytest.mark.parametrize("kind", ["int8", "nf4", pytest.param("int4", marks=pytest.mark.nightly)])
def test_quantising_keeps_the_router_and_rounds_the_experts(kind, mixture):
    model, params = mixture
    quantised = cast_params(params, kind)
    mlp = quantised["layers"]["mlp"]
    np.testing.assert_array_equal(mlp["router"]["weight"], params["layers"]["mlp"]["router"]["weight"])
    assert mlp["down"]["weight"].codes.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    assert mlp["down"]["weight"].scales.shape == ((3, 8, 32) if kind == "int8" else (3, 8, 3, 32))
    assert jax.tree.structure(model.logical_axes(kind), is_leaf=lambda axes: isinstance(axes, tuple)) == (
        jax.tree.structure(quantised)
    )
    tokens = draw_tokens(0, 1, 12)
    exact = hidden_states(model, params, tokens, *whole_rows(tokens))
    rounded = hidden_states(model, quantised, tokens, *whole_rows(tokens))
    assert 0 < np.abs(exact - rounded).mean() < (0.1 if kind == "int8" else 0.5)


def test_layers_transposed_for_decoding_give_the_same(mixture):
    model, params = mixture
    tokens, cache = draw_tokens(0, 2, 1), model.init_cache(2, 4)
    expected, _ = decode(model, params, cache, tokens, np.zeros_like(tokens))
    transposed = transpose_layers(jax.tree.map(jnp.copy, params))
    got, _ = decode(model, transposed, model.init_cache(2, 4), tokens, np.zeros_like(tokens))
    close(got, expected)


def test_only_active_experts_count_in_flops():
    config = read_config_json(FILES["qwen3_moe"])
    inactive = (8 - 3) * 3 * 32 * 24 * config.num_layers
    assert config.num_params() - config.num_active_params() == inactive
    all_active = dataclasses.replace(config, experts_per_token=8)
    assert all_active.flops_per_token(1) - config.flops_per_token(1) == 2 * inactive


def test_merged_adapters_give_the_policy_of_their_sum(mixture):
    model, params = mixture
    shape = params["layers"]["mlp"]["gate"]["weight"].shape
    random = np.random.default_rng(2)
    pair = Adapter(
        jnp.asarray(random.normal(0, 0.1, (*shape[:-1], 2)), "f"),
        jnp.asarray(random.normal(0, 0.1, (*shape[:2], 2, shape[-1])), "f"),
    )
    merged = merge_adapters(params, {"layers": {"mlp": {"gate": {"weight": pair}}}}, LoraConfig(rank=1, alpha=2.0))
    is_adapted = lambda node: isinstance(node, AdaptedMatrix)  # noqa: E731
    summed = jax.tree.map(lambda node: node.astype("float32") if is_adapted(node) else node, merged, is_leaf=is_adapted)
    tokens = draw_tokens(0, 1, 12)
    got, expected = (hidden_states(model, each, tokens, *whole_rows(tokens)) for each in (merged, summed))
    close(got, expected, atol=1e-3)
