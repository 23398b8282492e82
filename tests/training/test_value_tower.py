"""A value head with a trunk of its own: where it starts, what it reads and what trains it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kto_jax.config import Config, ConfigError, LoraConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, place_batch, shardings
from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params
from kto_jax.models.weights.value_head import load_value_head, save_value_head
from kto_jax.objectives import make_objective
from kto_jax.shapes import LabelledRows, Sampled
from kto_jax.training.checks import check_conflicts
from kto_jax.training.flops import tokens_and_flops
from kto_jax.training.forward import completion_states, read_completions
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.state import create_state
from kto_jax.training.step import Recipe, jit_train_step
from tests.models.weights.directories import write_model
from tests.synthetic import make_index, make_schedule
from tests.training.mesh_steps import CONFIG

OBJECTIVE = make_objective(ObjectiveConfig(name="ppo", value_tower=True), num_desirable=1, num_undesirable=1)


@functools.cache
def tower_model():
    return Model.create(CONFIG, scalar_head="value", value_tower=True)


def drawn(model, dtype="float32"):
    """Parameters with a head that is not 0, and a tower that is not the policy's trunk."""
    params = model.init_params(jax.random.key(0), dtype)
    head = params[SCALAR_HEAD]
    head["last"]["weight"] += 0.1
    head[TOWER] = jax.tree.map(lambda leaf: leaf * 1.1, head[TOWER])
    return jax.device_get(params)


def batch_of():
    """One batch of 16 completions with figures of sampled tokens."""
    index = make_index(16, vocab_size=CONFIG.vocab_size, max_length=38)
    schedule = make_schedule(index, batch_size=16, row_length=80, microbatch_rows=8, max_length=38, shuffle=False)
    batch = schedule.batch(0)
    rng = np.random.default_rng(0)
    figures = [rng.normal(size=batch.matched.targets.shape).astype(np.float32) for _ in dataclasses.fields(Sampled)]
    return dataclasses.replace(batch, sampled=Sampled(*figures))


def test_the_tower_starts_as_the_policys_trunk_in_buffers_of_its_own():
    params = jax.jit(lambda: tower_model().init_params(jax.random.key(0), "float32"))()
    tower = params[SCALAR_HEAD][TOWER]
    assert set(tower) == {"embed", "layers", "final_norm"}
    for name, part in tower.items():
        for own, policy in zip(jax.tree.leaves(part), jax.tree.leaves(params[name]), strict=True):
            np.testing.assert_array_equal(own, policy)
            assert own.unsafe_buffer_pointer() != policy.unsafe_buffer_pointer()


def test_weights_of_a_folder_become_policy_and_tower(tmp_path):
    model = tower_model()
    write_model(tmp_path, CONFIG)
    params = load_params(model, tmp_path, param_dtype="float32")
    tower = params[SCALAR_HEAD].pop(TOWER)
    jax.tree.map(np.testing.assert_array_equal, tower, {name: params[name] for name in tower})
    for own, policy in zip(jax.tree.leaves(tower), jax.tree.leaves({n: params[n] for n in tower}), strict=True):
        assert own.unsafe_buffer_pointer() != policy.unsafe_buffer_pointer()


def test_values_are_the_heads_on_the_towers_states_and_train_nothing_of_the_policy():
    model, batch = tower_model(), batch_of()
    labelled = LabelledRows(batch.matched, batch.desirable, batch.scores, sampled=batch.sampled)
    params, rows = jax.device_put(drawn(model)), jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), labelled)

    @jax.jit
    def values(params):
        return read_completions(model, OBJECTIVE, params, {}, rows).tokens.values

    head = dict(params[SCALAR_HEAD])
    tower, plain = head.pop(TOWER), Model.create(CONFIG, scalar_head="value")
    expected = plain.apply_scalar_head({SCALAR_HEAD: head}, completion_states(plain, tower, rows.rows))
    np.testing.assert_allclose(values(params), expected, atol=1e-6)
    on_policy = plain.apply_scalar_head({SCALAR_HEAD: head}, completion_states(plain, params, rows.rows))
    assert np.abs(expected - on_policy).max() > 1e-3
    gradient = jax.grad(lambda params: jnp.sum(jnp.square(values(params))))(params)
    moved = {name for name, part in gradient.items() if any(leaf.any() for leaf in jax.tree.leaves(part))}
    assert moved == {SCALAR_HEAD}
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient[SCALAR_HEAD][TOWER]["layers"]))


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 2, 2), (1, 8)])
def test_a_step_over_a_mesh_is_that_of_one_device(sizes):
    expected, found = step_over((1,)), step_over(sizes)
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
    for own, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


@functools.cache
def step_over(sizes):
    """The loss of a step of SGD, and the policy after it."""
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(MeshConfig(*sizes), devices)
    model = Model.create(CONFIG, scalar_head="value", value_tower=True, layout=make_layout(mesh))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    policy, optimizer = jax.device_put(drawn(model), layout), optax.sgd(0.1)
    state = create_state(policy, {}, optimizer, mesh, {})
    step = jit_train_step(Recipe(model, OBJECTIVE, optimizer, optax.constant_schedule(0.1)))
    state, figures = step(state, place_batch(mesh, batch_of()))
    return float(figures["loss"]), jax.device_get(state.policy)


def test_weight_decay_reaches_the_towers_matrices_as_the_policys():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, make_learning_rate(config, 10), value_head=True)
    params = jax.tree.map(jnp.ones_like, tower_model().abstract_params("float32"))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    head = updates[SCALAR_HEAD]
    for name in ("embed", "layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, head[TOWER][name], updates[name])
    assert head[TOWER]["layers"]["mlp"]["up"]["weight"].all() and not head["first"]["weight"].any()


def test_the_towers_passes_are_counted():
    batch = batch_of()
    plain, tower = (
        float(tokens_and_flops(model, OBJECTIVE, batch)["flops"])
        for model in (Model.create(CONFIG, scalar_head="value"), tower_model())
    )
    without_head = CONFIG.flops_per_token(attended=0, head=False) / CONFIG.flops_per_token(attended=0, head=True)
    assert 1 + without_head < tower / plain < 2


def test_the_file_of_a_head_holds_its_tower(tmp_path):
    head = drawn(tower_model())[SCALAR_HEAD]
    save_value_head(tmp_path / "head.safetensors", head)
    jax.tree.map(np.testing.assert_array_equal, load_value_head(tmp_path / "head.safetensors"), head)


def test_what_contradicts_a_tower_is_refused():
    objective = ObjectiveConfig(name="ppo", value_tower=True)
    with pytest.raises(ConfigError, match="value_detached=False with value_tower=True: the value head reads no hidden"):
        make_objective(dataclasses.replace(objective, value_detached=False), num_desirable=1, num_undesirable=1)
    with pytest.raises(ConfigError, match=r"objective.value_tower=True has no effect on the objective 'grpo'"):
        make_objective(dataclasses.replace(objective, name="grpo"), num_desirable=1, num_undesirable=1)
    with pytest.raises(ConfigError, match=r"a tower trains all weights of a second model. Allowed: False"):
        check_conflicts(Config(objective=objective, lora=LoraConfig(rank=4)), OBJECTIVE)
