"""bfloat16 weights and moments: changes below the dtype's spacing still count on average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import MeshConfig, OptimizerConfig
from kto_jax.devices.sharding import make_mesh
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.rounding import round_stochastically, with_bfloat16_moments, with_bfloat16_params
from kto_jax.training.state import create_state

ROUND = jax.jit(round_stochastically)


@pytest.mark.parametrize("x", [1.0 + 0.3 / 128, -1.0 - 0.3 / 128, 3e-39, 1e30, 255.9])
def test_a_number_is_rounded_to_its_neighbours_and_correct_on_average(x):
    rounded = np.asarray(ROUND(jnp.full(100_000, x, jnp.float32), jax.random.key(0)).astype(jnp.float32))
    exact = float(np.float32(x))
    above, below = rounded.max(), rounded.min()
    assert set(np.unique(rounded)) == {below, above}
    assert below < exact < above
    share = (exact - below) / (above - below)
    assert np.mean(rounded == above) == pytest.approx(share, abs=0.01)


def test_bfloat16_values_and_non_finite_ones_are_unchanged():
    x = jnp.array([0.0, -0.0, 1.5, -(2.0**100), jnp.inf, -jnp.inf, jnp.nan])
    for seed in range(20):
        np.testing.assert_array_equal(ROUND(x, jax.random.key(seed)).astype(jnp.float32), x)


def test_random_bits_do_not_depend_on_the_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    expected = ROUND(x, jax.random.key(1))
    for sizes, spec in ((MeshConfig(data=1, fsdp=8), ("fsdp",)), (MeshConfig(fsdp=2, tensor=4), ("tensor", "fsdp"))):
        layout = NamedSharding(make_mesh(sizes), PartitionSpec(*spec))
        rounded = jax.jit(round_stochastically, out_shardings=layout)(jax.device_put(x, layout), jax.random.key(1))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), expected.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(optimizer, num_steps, params, gradient):
    """Parameters and state after steps with one gradient."""

    def step(_, carry):
        updates, state = optimizer.update(gradient, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, num_steps, step, (params, optimizer.init(params)))


def mean(x):
    return float(jnp.mean(x.astype(jnp.float32)))


def test_tiny_updates_move_bfloat16_weights_as_they_move_float32_ones():
    optimizer = optax.sgd(1e-5)  # Half the spacing of bfloat16 at 1 is 2e-3.
    wide, gradient = {"w": jnp.ones(8192)}, {"w": jnp.ones(8192)}
    narrow = {"w": wide["w"].astype(jnp.bfloat16)}
    exact, still, moved = (
        run(chosen, 400, params, gradient)[0]["w"]
        for chosen, params in ((optimizer, wide), (optimizer, narrow), (with_bfloat16_params(optimizer, 0), narrow))
    )
    assert mean(exact) == pytest.approx(1 - 400e-5, rel=1e-5)
    assert mean(still) == 1  # rounded to the nearest
    assert moved.dtype == jnp.bfloat16
    assert 1 - mean(moved) == pytest.approx(400e-5, rel=0.1)


@pytest.mark.parametrize("inner, moment", [
    (optax.scale_by_adam(b1=0.9, b2=0.999), lambda state: state.nu),
    (optax.scale_by_rms(decay=0.999), lambda state: state.nu),
], ids=["adam", "rms"])  # fmt: skip
def test_a_second_moment_in_bfloat16_follows_the_float32_one(inner, moment):
    params, gradient = {"w": jnp.zeros(4096)}, {"w": jnp.ones(4096)}
    exact = mean(moment(run(inner, 1500, params, gradient)[1])["w"])
    kept = moment(run(with_bfloat16_moments(inner, 0), 1500, params, gradient)[1].state)["w"]
    nearest = _rounded_to_nearest(inner)
    frozen = mean(moment(run(nearest, 1500, params, gradient)[1])["w"])
    assert kept.dtype == jnp.bfloat16
    assert exact == pytest.approx(1 - 0.999**1500, rel=1e-3)
    assert mean(kept) == pytest.approx(exact, rel=0.01)
    assert frozen < 0.5 * exact


def _rounded_to_nearest(inner):
    """Moments in bfloat16 without stochastic rounding."""

    def narrow(state):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state, params)
        return updates, narrow(state)

    return optax.GradientTransformation(inner.init, update)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_moments_of_bfloat16_weights_are_float32_unless_configured(name):
    params = {"w": jnp.ones((8, 4), jnp.bfloat16)}
    for moments in ("float32", "bfloat16"):
        config = OptimizerConfig(name=name, warmup_steps=0, moments_dtype=moments)
        optimizer = make_optimizer(config, make_learning_rate(config, 10), param_dtype="bfloat16", seed=3)
        before = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)({"w": jnp.ones((8, 4))}, before, params)
        kept = {x.dtype.name for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert kept == {moments}
        assert jax.tree.map(lambda x: x.dtype, before) == jax.tree.map(lambda x: x.dtype, after)
        # A state from a checkpoint gives the same update; another step or seed gives another.
        again, _ = jax.jit(optimizer.update)({"w": jnp.ones((8, 4))}, jax.device_get(before), params)
        np.testing.assert_array_equal(again["w"], updates["w"])


def test_draws_differ_by_step_by_seed_and_by_array():
    params = {name: jnp.ones(512, jnp.bfloat16) for name in ("a", "b")}
    gradient = jax.tree.map(lambda x: jnp.full(512, 1e-3), params)

    def drawn(seed):
        optimizer = with_bfloat16_params(optax.sgd(1.0), seed)
        first, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
        return first["a"], first["b"], jax.jit(optimizer.update)(gradient, state, params)[0]["a"]

    draws = [np.asarray(draw) for draw in (*drawn(0), *drawn(1))]
    assert len({draw.tobytes() for draw in draws}) == 6


def test_the_rounded_state_is_sharded_like_the_parameters():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    layout = NamedSharding(mesh, PartitionSpec("fsdp"))
    policy = {"w": jax.device_put(jnp.ones((8, 2), jnp.bfloat16), layout)}
    config = OptimizerConfig(moments_dtype="bfloat16")
    optimizer = make_optimizer(config, make_learning_rate(config, 10), param_dtype="bfloat16")
    state = create_state(policy, {}, optimizer, mesh, {})
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (8, 2)]
    assert len(moments) == 2
    assert all(moment.sharding == layout for moment in moments)
