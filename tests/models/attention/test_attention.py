from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.models.attention.dense import attention


def draw(rows=2, length=13, heads=4, kv_heads=2, head_dim=8):
    random = np.random.default_rng(0)
    query = random.standard_normal((rows, length, heads, head_dim), np.float32)
    key, value = random.standard_normal((2, rows, length, kv_heads, head_dim), np.float32)
    # Segments of 5 and the rest but the last two tokens, which are padding.
    segments = np.where(np.arange(length) < 5, 1, 2)
    segments[-2:] = 0
    positions = np.where(np.arange(length) < 5, np.arange(length), np.arange(length) - 5)
    positions[-2:] = 0
    tile = lambda x: np.broadcast_to(x[None], (rows, length))  # noqa: E731
    return query, key, value, tile(positions), tile(segments)


@partial(jax.jit, static_argnames=("chunk", "window", "softcap", "scale"))
def attend(query, key, value, positions, segments, chunk=512, **options):
    return attention(
        query, key, value, query_places_RL=positions, key_places_RS=positions, query_segments_RL=segments,
        key_segments_RS=segments, chunk=chunk, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 1.5, "scale": 0.7}], ids=["plain", "gemma"])
def test_attention_equals_a_loop_over_rows_heads_and_tokens(options):
    query, key, value, positions, segments = (np.asarray(x, np.float64) for x in draw())
    mixed = np.asarray(attend(*draw(), **options))
    window, softcap = options.get("window", 13), options.get("softcap", 1e6)
    rows, length, heads, head_dim = query.shape
    for row in range(rows):
        for head in range(heads):
            for place in range(length - 2):
                seen = [
                    other
                    for other in range(place + 1)
                    if segments[row, other] == segments[row, place]
                    and 0 <= positions[row, place] - positions[row, other] < window
                ]
                scores = np.array([query[row, place, head] @ key[row, other, head // 2] for other in seen])
                scores *= options.get("scale", 1 / np.sqrt(head_dim))
                shares = np.exp(softcap * np.tanh(scores / softcap))
                expected = (shares / shares.sum()) @ value[row, seen, head // 2]
                np.testing.assert_allclose(mixed[row, place, head], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [5, 12])
def test_chunks_of_queries_give_the_values_and_gradients_of_one_block(chunk):
    query, key, value, positions, segments = draw()
    weights = np.random.default_rng(1).standard_normal(query.shape, np.float32)

    def total(query, key, value, chunk):
        return jnp.sum(weights * attend(query, key, value, positions, segments, chunk))

    dense = jax.jit(jax.value_and_grad(partial(total, chunk=512), (0, 1, 2)))(query, key, value)
    chunked = jax.jit(jax.value_and_grad(partial(total, chunk=chunk), (0, 1, 2)))(query, key, value)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), chunked, dense)


def test_a_query_that_sees_no_key_has_no_nan_in_value_or_gradient():
    query, key, value, positions, _ = draw()
    total = lambda query: attention(  # noqa: E731
        query, key, value, query_places_RL=positions - 1, key_places_RS=positions,
        query_segments_RL=np.zeros_like(positions), key_segments_RS=np.ones_like(positions),
    ).sum()  # fmt: skip
    mixed, gradient = jax.jit(jax.value_and_grad(total))(query)
    assert np.isfinite(mixed) and np.isfinite(gradient).all()


def test_no_array_grows_with_the_square_of_the_length():
    length, chunk = 2048, 256
    gradient = jax.jit(jax.grad(lambda *qkv: attend(*qkv, *places, chunk=chunk).sum(), (0, 1, 2)))
    query, key, value, *places = draw(rows=1, length=length)
    used = gradient.lower(query, key, value).compile().memory_analysis().temp_size_in_bytes
    one_block = 4 * 4 * chunk * length  # float32 scores of four heads
    assert used < 6 * one_block < 4 * 4 * length * length
