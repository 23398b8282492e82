import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import MeshConfig, OptimizerConfig
from kto_jax.devices.sharding import make_mesh
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.state import create_state


def rates(**options):
    learning_rate = make_learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4, **options), 12)
    return [float(learning_rate(step)) for step in range(13)]


def test_warm_up_is_linear_and_the_first_step_already_moves():
    assert rates(schedule="constant")[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_and_cosine_end_at_the_final_rate():
    assert rates(schedule="linear")[4:] == pytest.approx([1 - k / 8 for k in range(9)])
    cosine = rates(schedule="cosine", final_learning_rate=0.2)
    assert cosine[8] == pytest.approx(0.6)
    assert cosine[12] == pytest.approx(0.2)


def test_without_warm_up_the_rate_begins_at_its_peak():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="linear")
    assert float(make_learning_rate(config, 4)(0)) == 1.0


def update(name, gradient, **options):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", decayed="all", **options
    )
    optimizer = make_optimizer(config, make_learning_rate(config, 10))
    params = {"w": jnp.array([3.0, 4.0])}
    return optimizer.update({"w": jnp.array(gradient)}, optimizer.init(params), params)


def test_adamw_by_hand():
    updates, _ = update("adamw", [0.5, -2.0], weight_decay=0.01)
    np.testing.assert_allclose(updates["w"], [-0.1 - 0.1 * 0.03, 0.1 - 0.1 * 0.04], rtol=1e-4)


def test_rmsprop_by_hand():
    updates, _ = update("rmsprop", [0.5, -2.0], weight_decay=0.01)
    # The mean square is 1 % of the gradient's after one step: the update is ten times the rate.
    np.testing.assert_allclose(updates["w"], [-1.0 - 0.1 * 0.03, 1.0 - 0.1 * 0.04], rtol=1e-4)


PARAMETERS = {
    "embed": {"table": (6, 4)}, "head": {"weight": (4, 6)}, "final_norm": {"scale": (4,)},
    "scorer": {"first": {"weight": (4, 4), "bias": (4,)}},
    "layers": {
        "attention_norm": {"scale": (2, 4)},
        "attention": {"query": {"weight": (2, 4, 4), "bias": (2, 4)}, "query_norm": {"scale": (2, 2)}},
        "mlp": {"up": {"weight": {"a": (2, 4, 1), "b": (2, 1, 4)}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("decayed", ["matrices", "all"])
def test_weight_decay_reaches_matrices_of_layers_and_no_norm_bias_embedding_or_head(name, decayed):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, decayed=decayed
    )
    optimizer = make_optimizer(config, make_learning_rate(config, 10))
    params = jax.tree.map(jnp.ones, PARAMETERS, is_leaf=lambda node: isinstance(node, tuple))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(np.unique(update)[0])
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
    }
    matrices = {"layers.attention.query.weight", "layers.mlp.up.weight.a", "layers.mlp.up.weight.b"}
    expected = {path: -0.05 if decayed == "all" or path in matrices else 0.0 for path in moved}
    assert moved == pytest.approx(expected)


def test_the_optimizer_has_the_state_that_optax_gives_it_whatever_is_decayed():
    """A checkpoint's arrays are found by their path."""
    params = {"layers": {"w": jnp.ones((1, 2, 2))}}
    config = OptimizerConfig(weight_decay=0.1)
    _, ours = make_optimizer(config, make_learning_rate(config, 10)).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(optax.adamw(optax.constant_schedule(1.0)).init(params))


def test_rmsprop_steps_alike_for_the_tiny_gradients_of_a_large_model():
    # eps is outside the root, as in torch: 1e-8 is small compared with a gradient of 1e-6.
    updates, _ = update("rmsprop", [1e-6, -1e-6])
    np.testing.assert_allclose(updates["w"], [-0.909, 0.909], rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
    _, (_, adam) = update("adamw", [30.0, 40.0], clip_norm=10.0)
    np.testing.assert_allclose(adam[0].mu["w"], [0.6, 0.8], rtol=1e-5)


def test_gradients_within_the_bound_are_unchanged_and_infinity_does_not_clip():
    for bound in (51.0, np.inf):
        _, (_, adam) = update("adamw", [30.0, 40.0], clip_norm=bound)
        np.testing.assert_allclose(adam[0].mu["w"], [3.0, 4.0], rtol=1e-6)
    _, (_, adam) = update("adamw", [0.0, 0.0], clip_norm=1.0)
    np.testing.assert_array_equal(adam[0].mu["w"], [0.0, 0.0])


def test_a_value_head_is_clipped_separately_from_the_policy():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=10.0, value_clip_norm=0.5)
    optimizer = make_optimizer(config, make_learning_rate(config, 10), value_head=True)
    params = {"embed": jnp.zeros(2), "scorer": {"w": jnp.zeros(2)}}
    gradient = {"embed": jnp.array([3.0, 4.0]), "scorer": {"w": jnp.array([30.0, 40.0])}}
    _, (_, adam) = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(adam[0].mu["embed"], [0.3, 0.4], rtol=1e-5)  # a norm of 5 is within 10
    np.testing.assert_allclose(adam[0].mu["scorer"]["w"], [0.03, 0.04], rtol=1e-5)


def test_the_optimizer_state_is_sharded_like_the_parameters():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    layout = NamedSharding(mesh, PartitionSpec("fsdp"))
    policy = {"w": jax.device_put(jnp.ones((8, 2)), layout)}
    state = create_state(policy, policy, optax.adamw(1e-3), mesh, {})
    assert state.opt_state[0].mu["w"].sharding == layout
    assert state.opt_state[0].count.sharding.is_fully_replicated


def test_a_reference_that_is_the_policy_is_a_copy_of_it():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    policy = {"w": jax.device_put(jnp.ones(8), jax.devices()[0])}
    state = create_state(policy, policy, optax.sgd(1.0), mesh, {})
    assert state.policy["w"].unsafe_buffer_pointer() != state.reference["w"].unsafe_buffer_pointer()
