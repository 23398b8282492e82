import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kto_jax.losses import segment_sums, token_logps
from tests.losses import oracle


def random_head(seed=0, tokens=37, width=16, vocabulary=101):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    return jnp.array(hidden), jnp.array(head), jnp.array(rng.integers(0, vocabulary, tokens), jnp.int32)


def dense(hidden, head, targets, softcap=None, bias=None):
    logits = hidden @ head if bias is None else hidden @ head + bias[None]
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]


@pytest.mark.parametrize("chunk_size", [1, 5, 37, None])
@pytest.mark.parametrize("softcap, with_bias", [(None, False), (5.0, False), (None, True), (5.0, True)])
def test_values_equal_the_independent_numpy_version(chunk_size, softcap, with_bias):
    hidden, head, targets = random_head()
    bias = jnp.linspace(-1.0, 1.0, 101) if with_bias else None
    logps = token_logps(hidden, head, targets, softcap=softcap, bias=bias, chunk_size=chunk_size)
    np.testing.assert_allclose(logps, oracle.token_logps(hidden, head, targets, softcap, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_equal_those_of_the_dense_form(chunk_size, softcap):
    hidden, head, targets = random_head()
    bias, weights = jnp.linspace(-1.0, 1.0, 101), jnp.linspace(-2.0, 2.0, 37)

    def fused(hidden, head, bias):
        logps = token_logps(hidden, head, targets, softcap=softcap, bias=bias, chunk_size=chunk_size)
        return jnp.sum(weights * logps)

    def plain(hidden, head, bias):
        return jnp.sum(weights * dense(hidden, head, targets, softcap, bias))

    for got, expected in zip(
        jax.grad(fused, (0, 1, 2))(hidden, head, bias), jax.grad(plain, (0, 1, 2))(hidden, head, bias), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_head_stored_as_a_table_gives_the_same():
    hidden, head, targets = random_head()
    function = jax.value_and_grad(
        lambda w, axes: jnp.sum(token_logps(hidden, w, targets, head_axes=axes, chunk_size=5))
    )
    total, gradient = function(head, "dv")
    turned_total, turned_gradient = function(head.T, "vd")
    np.testing.assert_allclose(turned_total, total, rtol=1e-6)
    np.testing.assert_allclose(turned_gradient.T, gradient, rtol=1e-5, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        hidden, head, targets = random_head(tokens=5, vocabulary=11)
        wide = hidden.astype(jnp.float64), head.astype(jnp.float64)

        def logps(hidden, head):
            return token_logps(jnp.asarray(hidden), jnp.asarray(head), targets, softcap=4.0, chunk_size=2)

        check_grads(logps, wide, order=1, modes=["rev"])


def test_rows_are_chunked_along_their_length():
    hidden, head, targets = random_head(tokens=36)
    rows = token_logps(hidden.reshape(4, 9, 16), head, targets.reshape(4, 9), chunk_size=8)
    np.testing.assert_allclose(rows.reshape(-1), token_logps(hidden, head, targets), rtol=1e-6, atol=1e-6)


def equations(jaxpr):
    """All equations, those of loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def largest_intermediate(jaxpr):
    """Number of elements of the largest array that any equation makes, loops included."""
    return max(int(np.prod(value.aval.shape)) for equation in equations(jaxpr) for value in equation.outvars)


def test_no_pass_makes_an_array_of_tokens_by_vocabulary():
    tokens, vocabulary, chunk = 512, 4096, 32
    hidden, head, targets = random_head(tokens=tokens, width=8, vocabulary=vocabulary)

    def loss(hidden, head):
        return jnp.sum(token_logps(hidden, head, targets, chunk_size=chunk, kept_logits=tokens * vocabulary - 1))

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(hidden, head).jaxpr
    assert largest_intermediate(jaxpr) == chunk * vocabulary
    dense_jaxpr = jax.make_jaxpr(lambda h, w: jnp.sum(dense(h, w, targets)))(hidden, head).jaxpr
    assert largest_intermediate(dense_jaxpr) == tokens * vocabulary


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_kept_logits_give_the_same_gradients_with_one_product_less(softcap):
    hidden, head, targets = random_head(tokens=50)

    def gradients(kept_logits):
        def loss(hidden, head):
            logps = token_logps(hidden, head, targets, chunk_size=16, softcap=softcap, kept_logits=kept_logits)
            return jnp.sum(jnp.sin(logps))

        return jax.grad(loss, (0, 1))

    def num_products(kept_logits):
        jaxpr = jax.make_jaxpr(gradients(kept_logits))(hidden, head).jaxpr
        return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))

    few, all_of_them = 0, 52 * head.shape[1]  # four chunks of 13 tokens
    # Not bitwise: the compiler fuses a soft-cap with what follows it.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, *(jax.jit(gradients(n))(hidden, head) for n in (few, all_of_them)))
    assert (num_products(few), num_products(all_of_them)) == (4, 3)


@pytest.mark.parametrize("dtype, highest", [(jnp.float32, True), (jnp.bfloat16, False)])
def test_float32_products_request_full_precision(dtype, highest):
    hidden, head, targets = random_head()
    function = jax.value_and_grad(lambda h, w: jnp.sum(token_logps(h, w, targets, kept_logits=0)), (0, 1))
    jaxpr = jax.make_jaxpr(function)(hidden.astype(dtype), head.astype(dtype)).jaxpr
    precisions = [e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(precisions) == 4  # forward, and logits again, hidden and head for the gradient
    for precision in precisions:
        assert (precision is not None and set(precision) == {jax.lax.Precision.HIGHEST}) == highest


def test_bfloat16_states_give_float32_log_probabilities():
    hidden, head, targets = random_head()
    rounded = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    logps = token_logps(*rounded, targets)
    assert logps.dtype == jnp.float32
    expected = oracle.token_logps(*(np.asarray(x, np.float64) for x in rounded), targets)
    np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-4)


def test_segment_sums_add_the_tokens_of_each_example_in_float32():
    values = jnp.ones(2048, jnp.bfloat16) * 0.1
    sums = segment_sums(values, jnp.arange(2048) // 1024, 3, where=jnp.arange(2048) != 5)
    one = float(jnp.bfloat16(0.1))
    np.testing.assert_allclose(sums, [1023 * one, 1024 * one, 0], rtol=1e-6)


def test_segment_sums_of_nothing_are_zero_with_zero_gradient():
    def total(values):
        return jnp.sum(segment_sums(values, jnp.zeros(4, jnp.int32), 2, where=jnp.zeros(4, bool)))

    value, gradient = jax.value_and_grad(total)(jnp.ones(4))
    assert value == 0
    assert not jnp.any(gradient)


@pytest.mark.parametrize("length, num_devices, num_chunks", [(1024, 1, 2), (3072, 1, 3), (128, 1, 1), (1024, 8, 1)])
def test_one_loop_over_all_logits_is_left_to_small_ones(length, num_devices, num_chunks):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((length, 8), jnp.float32), ((8, 32768), jnp.float32), ((length,), jnp.int32)
    )]  # fmt: skip
    jaxpr = jax.make_jaxpr(functools.partial(token_logps, num_devices=num_devices))(*shapes)
    loops = [loop.params["length"] for loop in equations(jaxpr.jaxpr) if loop.primitive.name == "scan"]
    assert loops == [num_chunks]
