"""What holds for every loss: values and gradients, extremes, order, precision. `cases.py` lists them."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kto_jax import losses
from tests.losses.cases import (
    CASES,
    NUM_INPUTS,
    TOLERANCE,
    errors,
    finite_at_extremes,
    relative_error,
    value_and_gradients,
)

MODULES = [module.name for module in pkgutil.iter_modules(losses.__path__)]
every_loss = pytest.mark.parametrize("name", CASES)


def draw(name, seed=1):
    # One size for all: what is compiled for one test serves the next.
    return CASES[name].inputs(np.random.default_rng(seed), NUM_INPUTS)


def num_gradients(name):
    return len(CASES[name].oracle(*draw(name))[1])


DIFFERENTIABLE = [name for name in CASES if num_gradients(name)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    module = importlib.import_module(f"kto_jax.losses.{name}")
    result = doctest.testmod(module, extraglobs={"jnp": jnp})
    assert result.failed == 0
    assert result.attempted > 0 or name in ("halo", "logprobs")


def test_every_loss_and_variant_has_an_independent_version():
    covered = " ".join(CASES).replace("reward", "bradley_terry")
    for name in losses.__all__:
        # The routers' losses read no completions: test_router.py.
        if name.endswith("_loss") and name not in ("halo_loss", "balance_loss", "z_loss"):
            assert name.removesuffix("_loss") in covered
    for name in (*losses.DPO_VARIANTS, *losses.F_DIVERGENCES):
        assert f"dpo {name}" in covered or name == "reverse_kl"


@every_loss
def test_value_and_gradient_equal_the_independent_version_at_a_thousand_inputs(name):
    by_value, by_gradient = errors(CASES[name], seed=1)
    assert by_value <= TOLERANCE
    assert by_gradient is None or by_gradient <= TOLERANCE


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_right_relative_to_their_own_size(name):
    # Many gradients are far below 1, where an error relative to max(1, |value|) sees little.
    arrays = draw(name)
    _, expected = CASES[name].oracle(*arrays)
    _, gradients = value_and_gradients(CASES[name], arrays, len(expected))
    for gradient, right in zip(gradients, expected, strict=True):
        assert np.any(right)
        np.testing.assert_allclose(gradient, right, atol=1e-4 * np.max(np.abs(right)), rtol=1e-4)


@every_loss
def test_value_and_gradient_are_finite_at_log_ratios_of_ten_thousand(name):
    assert finite_at_extremes(CASES[name])


# Smooth ones: a difference may straddle the kink of a clip or a hinge, whose gradients the oracle has.
@pytest.mark.parametrize("name", [
    "kto", "kto log_sigmoid", "kto log_utility", "bco", "dpo sigmoid, smoothed", "dpo exo_pair", "dpo nca_pair",
    "dpo sppo_hard", "dpo apo_down", "dpo js", "orpo", "simpo", "cpo", "reward",
])  # fmt: skip
def test_gradients_agree_with_finite_differences(name):
    with jax.enable_x64(True):
        count = len(CASES[name].oracle(*draw(name))[1])
        arrays = [jnp.asarray(x[:10], jnp.float64 if x.dtype == np.float32 else None) for x in draw(name)]

        @jax.jit
        def loss(*first):
            return CASES[name].loss(*first, *arrays[count:])

        check_grads(loss, arrays[:count], order=1, modes=["rev"])


@every_loss
def test_the_order_of_the_examples_changes_nothing(name):
    arrays = [jnp.asarray(x) for x in draw(name)]
    np.testing.assert_allclose(
        CASES[name].loss(*(x[::-1] for x in arrays))[::-1], CASES[name].loss(*arrays), rtol=1e-5, atol=1e-6
    )


@every_loss
def test_bfloat16_inputs_are_taken_in_float32(name):
    arrays = [jnp.asarray(x) for x in draw(name)]
    rounded = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in arrays]
    result = CASES[name].loss(*rounded)
    assert result.dtype == jnp.float32
    widened = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in rounded]
    np.testing.assert_array_equal(result, CASES[name].loss(*widened))


@every_loss
def test_float64_inputs_stay_in_float64(name):
    arrays = draw(name)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else jnp.asarray(x) for x in arrays]
        result = CASES[name].loss(*wide)
    assert result.dtype == np.float64
    assert relative_error(result, CASES[name].oracle(*arrays)[0]) < 1e-13


MASKED = ["ppo_clip", "ppo_value", "k3_kl", "grpo", "generalized_advantages"]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_an_empty_mask_gives_zero_with_zero_gradient_whatever_is_masked(name, junk):
    *arrays, where = draw(name)
    arrays = [np.full_like(x, junk) for x in arrays]
    result, gradients = value_and_gradients(CASES[name], (*arrays, np.zeros_like(where)), 1)
    assert not jnp.any(result)
    assert not jnp.any(gradients[0])


@pytest.mark.parametrize("name", MASKED)
def test_what_is_masked_changes_nothing(name):
    *arrays, where = draw(name)
    spoiled = [np.where(where, x, np.nan).astype(np.float32) for x in arrays]
    for got, expected in zip(
        jax.tree.leaves(value_and_gradients(CASES[name], (*spoiled, where), 1)),
        jax.tree.leaves(value_and_gradients(CASES[name], (*arrays, where), 1)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
