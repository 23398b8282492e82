"""Gradient accumulation: the same sums in place and plainly."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kto_jax.training.step
from kto_jax.config import MeshConfig
from kto_jax.training import accumulate
from kto_jax.training.accumulate import accumulate_gradient
from tests.training.test_step import MESHES, PACKED, packed_result

INPUTS = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)


def share_of_loss(params, x):
    """A tied matrix, used twice, around a scan over layers; returns the hidden states as results."""
    hidden, _ = jax.lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer.astype(h.dtype)), None), x @ params["in"], params["layers"]
    )
    return jnp.sum(jnp.square(hidden @ params["in"].T)), hidden


def parameters(dtype):
    keys = jax.random.split(jax.random.key(0))
    layers = jax.random.normal(keys[0], (2, 5, 5)).astype(dtype)
    return {"in": jax.random.normal(keys[1], (8, 5)), "layers": layers}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("count", [0, 3, 4])
def test_the_sum_over_microbatches_is_that_of_the_whole(in_place, count):
    params = parameters("float32")
    loss, gradient, hidden = jax.jit(functools.partial(accumulate_gradient, share_of_loss, in_place=in_place))(
        params, INPUTS, count
    )
    whole = lambda params: sum((share_of_loss(params, x)[0] for x in INPUTS[:count]), jnp.zeros(()))  # noqa: E731
    expected, expected_gradient = jax.value_and_grad(whole)(params)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, expected_gradient)
    for index in range(4):
        expected_hidden = share_of_loss(params, INPUTS[index])[1] if index < count else jnp.zeros((3, 5))
        np.testing.assert_allclose(hidden[index], expected_hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_of_narrow_parameters_is_summed_in_float32(in_place):
    params = parameters("bfloat16")
    _, gradient, _ = jax.jit(functools.partial(accumulate_gradient, share_of_loss, in_place=in_place))(
        params, INPUTS, 4
    )
    parts = [jax.grad(lambda params, x=x: share_of_loss(params, x)[0])(params)["layers"] for x in INPUTS]
    assert parts[0].dtype == jnp.bfloat16
    assert gradient["layers"].dtype == jnp.float32
    np.testing.assert_allclose(
        gradient["layers"], sum(part.astype(jnp.float32) for part in parts), rtol=1e-2, atol=0.05
    )
    # A sum in bfloat16 would be a bfloat16 number.
    assert np.any(gradient["layers"] != gradient["layers"].astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [pytest.param("1", marks=pytest.mark.nightly), "2x2x2"])
def test_the_step_has_the_same_gradient_in_place_and_plainly(mesh, monkeypatch):
    config, num_devices = MESHES[mesh] if mesh != "1" else (MeshConfig(), 1)
    with jax.enable_x64(True):
        results = []
        for in_place in (True, False):
            chosen = functools.partial(accumulate_gradient, in_place=in_place)
            monkeypatch.setattr(kto_jax.training.step, "accumulate_gradient", chosen)
            results.append(packed_result("float64", config, *PACKED[2][:2], num_devices))
        (_, _, _, loss, gradient, _), (_, _, _, plain_loss, plain_gradient, _) = results
        assert loss == pytest.approx(plain_loss, rel=1e-12)
        difference = optax.tree.norm(jax.tree.map(np.subtract, gradient, plain_gradient))
        assert difference < 1e-12 * optax.tree.norm(gradient)


def test_without_references_in_jax_the_plain_sum_is_chosen(monkeypatch):
    assert accumulate.HAS_MUTABLE_REFS
    monkeypatch.delattr(jax, "new_ref")
    spec = importlib.util.spec_from_file_location("accumulate_without_references", accumulate.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.HAS_MUTABLE_REFS
    loss, _, _ = module.accumulate_gradient(share_of_loss, parameters("float32"), INPUTS, 4)
    assert loss == pytest.approx(sum(float(share_of_loss(parameters("float32"), x)[0]) for x in INPUTS), rel=1e-5)
