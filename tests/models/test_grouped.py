from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.models.grouped import (
    gradient_by_blocks,
    grouped_product,
    product_by_blocks,
    ragged_gradient,
    ragged_product,
)

# Groups that are empty, smaller than a block and of several blocks; the last rows are no group's.
SIZES = np.array([0, 3, 21, 0, 40, 1], np.int32)
ROWS = SIZES.sum() + 7
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    return [random.normal(0, 1, shape).astype("f") for shape in ((ROWS, 5), (len(SIZES), 5, 4), (ROWS, 4))]


def group_of_rows():
    return np.repeat(np.arange(len(SIZES)), SIZES)


@pytest.mark.parametrize("product", [ragged_product, product_by_blocks])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_row_is_multiplied_by_the_matrix_of_its_group(arrays, product, transposed):
    x, weights, _ = arrays
    given = weights.swapaxes(1, 2) if transposed else weights
    got = jax.jit(partial(product, transposed=transposed))(x, given, SIZES)
    for row, group in enumerate(group_of_rows()):
        close(got[row], x[row] @ weights[group])
    assert got.shape == (ROWS, 4) and not got[SIZES.sum() :].any()


@pytest.mark.parametrize("gradient", [ragged_gradient, gradient_by_blocks])
def test_every_matrix_gets_the_gradient_of_its_rows(arrays, gradient):
    x, weights, upstream = arrays
    expected = np.zeros_like(weights)
    for row, group in enumerate(group_of_rows()):
        expected[group] += np.outer(x[row], upstream[row])
    close(jax.jit(gradient)(x, upstream, SIZES), expected)


def test_the_gradient_is_that_of_a_product_of_rows_with_matrices_picked_for_them(arrays):
    x, weights, upstream = arrays
    picked = np.append(group_of_rows(), [0] * 7)
    counts = (np.arange(ROWS) < SIZES.sum())[:, None]

    def plain(x, weights):
        return jnp.sum(jnp.where(counts, jnp.einsum("mi,mio->mo", x, weights[picked]), 0) * upstream)

    expected = jax.grad(plain, argnums=(0, 1))(x, weights)
    grouped = lambda x, weights: jnp.sum(grouped_product(x, weights, SIZES) * upstream)  # noqa: E731
    jax.tree.map(close, jax.jit(jax.grad(grouped, argnums=(0, 1)))(x, weights), expected)


def test_the_gradient_of_bfloat16_products_is_summed_in_float32():
    # bfloat16 has no 301.
    x, weights = jnp.ones((301, 1), jnp.bfloat16), jnp.ones((1, 1, 1))
    product = lambda weights: jnp.sum(grouped_product(x, weights, np.array([301], np.int32)).astype("f"))  # noqa: E731
    gradient = jax.grad(product)(weights)
    assert gradient.dtype == jnp.float32 and gradient[0, 0, 0] == 301
