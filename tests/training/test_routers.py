"""The losses of routers and the load of experts in a step, compared with the batch's tokens taken together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kto_jax.config import Config, ConfigError, LoraConfig, MeshConfig, RouterConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, place_batch, shardings
from kto_jax.models.model import Model
from kto_jax.training.routers import NO_ROUTERS, RouterWeights, num_routed_tokens, router_metrics, router_weights
from kto_jax.training.state import TrainState, create_state
from kto_jax.training.step import Recipe, jit_train_step, loss_and_gradient, reference_point
from tests.losses import oracle
from tests.training.test_step import BATCH, CONFIG, MAX_LENGTH, OBJECTIVE, close_by_norm, make_schedule

EXPERTS = dataclasses.replace(CONFIG, num_experts=8, experts_per_token=2, initializer_range=0.2, family="olmoe")
WEIGHTS = RouterWeights(balance=0.5, z=0.1)


@functools.cache
def parameters():
    model = Model.create(EXPERTS, dtype="float64")
    return [jax.device_get(model.init_params(jax.random.key(seed), "float64")) for seed in (0, 1)]


@functools.cache
def all_tokens_together():
    """The weighted losses of the routers and their gradient, from all sequences in one batch, one to a row."""
    index, schedule = make_schedule(MAX_LENGTH, 8)
    ids, segments = np.zeros((2, BATCH, MAX_LENGTH), np.int32)
    for row, i in enumerate(schedule.step(0).ids):
        sequence = np.concatenate([index.prompt(i), index.completion(i)])[:MAX_LENGTH]
        ids[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    model, positions = Model.create(EXPERTS, dtype="float64"), np.tile(np.arange(MAX_LENGTH), (BATCH, 1))

    def loss(policy):
        _, routed = model.route(policy, ids, segments, positions)
        num_tokens = segments.sum() * EXPERTS.num_layers
        fractions = jax.lax.stop_gradient(jnp.sum(routed.counts, axis=0)) / num_tokens
        means = jnp.sum(routed.probabilities, axis=0) / num_tokens
        z = jnp.sum(routed.squared_normalizers) / num_tokens
        return WEIGHTS.balance * len(means) * jnp.sum(fractions * means) + WEIGHTS.z * z, routed

    (value, routed), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters()[0])
    return jax.device_get((value, gradient, routed, segments.sum()))


@functools.cache
def in_microbatches(weights, mesh_config, row_length, microbatch_rows, num_devices):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = Model.create(EXPERTS, dtype="float64", layout=make_layout(mesh))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float64"))
    policy, reference = (jax.device_put(params, layout) for params in parameters())
    batch = make_schedule(row_length, microbatch_rows)[1].batch(0)

    @jax.jit
    def run(policy, reference, batch):
        state = TrainState(0, policy, reference, (), {}, 0)
        point, _, batch = reference_point(model, OBJECTIVE, state, batch)
        return loss_and_gradient(model, OBJECTIVE, state, batch, point, weights)

    return int(batch.num_matched), *jax.device_get(run(policy, reference, place_batch(mesh, batch)))


@pytest.mark.nightly
@pytest.mark.parametrize("mesh, num_devices, layout", [
    (MeshConfig(), 1, (80, 8, 4)),
    pytest.param(MeshConfig(), 1, (38, 64, 1), marks=pytest.mark.exhaustive),
    (MeshConfig(data=2, expert=2, tensor=2), 8, (80, 16, 2)),
])  # fmt: skip
def test_the_routers_losses_do_not_depend_on_microbatches_packing_and_mesh(mesh, num_devices, layout):
    with jax.enable_x64(True):
        expected, expected_gradient, routed, _ = all_tokens_together()
        count, loss, gradient, completions = in_microbatches(WEIGHTS, mesh, *layout[:2], num_devices)
        _, without, gradient_without, _ = in_microbatches(NO_ROUTERS, mesh, *layout[:2], num_devices)
        assert count == layout[2]
        np.testing.assert_array_equal(completions.routed.counts.sum(axis=0), routed.counts)
        assert loss - without == pytest.approx(expected, rel=1e-9)
        added = jax.tree.map(np.subtract, gradient, gradient_without)
        assert close_by_norm(added, expected_gradient, 1e-9)
        assert optax.tree.norm(expected_gradient) > 0.01


def test_the_load_figures_are_those_of_the_tokens():
    with jax.enable_x64(True):
        value, _, routed, tokens = all_tokens_together()
    model = Model.create(EXPERTS)
    halves = jax.tree.map(lambda leaf: jnp.stack([leaf / 2, leaf / 2]).astype("f"), routed)
    figures = router_metrics(model, WEIGHTS, halves, jnp.asarray(tokens * EXPERTS.num_layers, "f"))
    assert figures["router_loss"] == pytest.approx(value, rel=1e-5)
    balance, z = oracle.router_losses(routed, tokens)
    assert figures["router_balance"] == pytest.approx(balance, rel=1e-5)
    assert figures["router_z"] == pytest.approx(z, rel=1e-5)
    assert figures["expert_max_load"] == pytest.approx(routed.counts.max() / (tokens * 2 / 8), rel=1e-5)
    assert 0 < figures["router_entropy"] < np.log(8)
    assert figures["dropped_tokens"] == 0
    fewer = dataclasses.replace(halves, counts=halves.counts.at[0, 0, 0].add(-1))
    assert router_metrics(model, WEIGHTS, fewer, jnp.asarray(tokens * 2, "f"))["dropped_tokens"] == 1


@pytest.mark.nightly
def test_a_step_reports_the_load_and_includes_the_routers_losses():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Model.create(EXPERTS, layout=make_layout(mesh))
    policy = jax.tree.map(lambda leaf: jnp.asarray(leaf, "f"), parameters_in_float32())
    step = jit_train_step(Recipe(model, OBJECTIVE, optax.sgd(0.1), lambda _: 0.1, router=WEIGHTS))
    batch = make_schedule(80, 8)[1].batch(0)
    state = create_state(policy, jax.tree.map(jnp.copy, policy), optax.sgd(0.1), mesh, {})
    _, figures = step(state, place_batch(mesh, batch))
    weights = np.where(batch.desirable, 1.5, 1.0) * batch.weights
    objective = np.sum(weights * batch.matched.filled) / 2 / BATCH  # policy and reference are equal
    assert figures["loss"] == pytest.approx(objective + float(figures["router_loss"]), rel=1e-5)
    assert figures["dropped_tokens"] == 0 and figures["expert_max_load"] >= 1
    assert float(num_routed_tokens(model, batch.matched)) == figures["tokens"] * EXPERTS.num_layers


def parameters_in_float32():
    return Model.create(EXPERTS).init_params(jax.random.key(0), "float32")


def test_the_weights_come_from_the_model_unless_they_are_set():
    mixture = dataclasses.replace(EXPERTS, balance_weight=0.02)
    adapters = Config(lora=LoraConfig(rank=2))
    assert router_weights(Config(), mixture) == RouterWeights(0.02, 0.0)
    assert router_weights(adapters, mixture) == RouterWeights(0.0, 0.0)
    given = RouterConfig(balance_weight=0.3, z_weight=0.001)
    assert router_weights(dataclasses.replace(adapters, router=given), mixture) == RouterWeights(0.3, 0.001)
    assert router_weights(Config(), CONFIG) == NO_ROUTERS
    with pytest.raises(ConfigError, match=r"balance_weight=0.3 and z_weight=0.001, and the model has no experts"):
        router_weights(Config(router=given), CONFIG)
