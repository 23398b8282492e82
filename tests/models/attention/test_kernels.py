"""Every attention for packed rows compared with dense attention, which test_attention.py tests."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.models.attention.blockwise import _bounds, blockwise_attention
from kto_jax.models.attention.dense import dense_attention, scaled
from kto_jax.models.attention.mosaic import first_keys, mosaic_attention
from kto_jax.models.attention.splash import block_and_length, segment_starts, splash_attention, tile_schedule
from kto_jax.models.attention.triton import triton_attention
from tests.losses.test_logprobs import equations

HIGHEST = jax.lax.Precision.HIGHEST
BLOCKS = partial(blockwise_attention, block=16, precision=HIGHEST)
needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="needs tokamax, which the extra [cuda] installs"
)


def packed(*rows, length):
    """Segment ids and positions of rows of segments of these lengths, the rest padding."""
    segments, positions = np.zeros((2, len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, size in enumerate(lengths, start=1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    return {"segment_ids_RL": segments, "positions_RL": positions}


def draw(tokens, heads=4, kv_heads=2, head_dim=8, dtype=np.float32):
    rows, length = tokens["segment_ids_RL"].shape
    random = np.random.default_rng(0)
    query, weights = random.standard_normal((2, rows, length, heads, head_dim)).astype(dtype)
    key, value = random.standard_normal((2, rows, length, kv_heads, head_dim)).astype(dtype)
    # Padding's values are meaningless, and nothing reads them.
    return query, key, value, weights * (tokens["segment_ids_RL"] > 0)[..., None, None]


def values_and_gradients(attend, query, key, value, weights):
    def total(*heads):
        mixed = attend(*heads)
        return jnp.sum(mixed * weights), mixed

    (_, mixed), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)
    return mixed * (weights != 0), *gradients


def compare(attend, tokens, *, atol=1e-5, **options):
    arrays = draw(tokens)
    found = values_and_gradients(partial(attend, **tokens, **options), *arrays)
    expected = values_and_gradients(partial(dense_attention, precision=HIGHEST, **tokens, **options), *arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), found, expected)


GEMMA = {"window": 9, "softcap": 1.5, "scale": 0.7}
ROWS = packed([5, 1, 40, 22], [100], [], length=100)


@pytest.mark.parametrize("options", [{}, GEMMA], ids=["plain", "gemma"])
def test_blocks_give_the_values_and_gradients_of_dense_attention(options):
    compare(BLOCKS, ROWS, **options)


def test_blocks_are_correct_for_any_order_of_the_tokens():
    shuffled = np.random.default_rng(1).permutation(100)
    compare(BLOCKS, {name: np.ascontiguousarray(x[:, shuffled]) for name, x in ROWS.items()}, window=9)
    # One segment runs backwards: all keys come after the tokens that see them.
    compare(BLOCKS, {name: np.ascontiguousarray(x[:, ::-1]) for name, x in ROWS.items()})


def test_padding_gets_zeros_and_gives_no_gradient():
    tokens = packed([20], [], length=40)
    query, key, value, _ = draw(tokens)
    mixed, *gradients = values_and_gradients(partial(BLOCKS, **tokens), query, key, value, np.ones_like(query))
    for array in (mixed, *gradients):
        assert np.all(np.asarray(array)[tokens["segment_ids_RL"] == 0] == 0)


def test_only_blocks_that_share_a_segment_are_visited():
    tokens = packed([16, 40, 8, 20], [84], [], length=96)
    split = [x.reshape(3, 6, 16) for x in tokens.values()]
    starts, stops = _bounds(*split, None)
    rows = [list(zip(*pair, strict=True)) for pair in zip(np.asarray(starts), np.asarray(stops), strict=True)]
    assert rows[0] == [(0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (4, 6)]
    assert rows[1] == [(6, 6 + block + 1) for block in range(6)]
    assert all(start == stop for start, stop in rows[2])
    starts, stops = _bounds(*split, 17)
    assert np.asarray(starts)[1].tolist() == [6, 6, 7, 8, 9, 10]


def test_blocks_work_in_float64_and_bfloat16():
    with jax.enable_x64(True):
        arrays = draw(ROWS, dtype=np.float64)
        found = values_and_gradients(partial(BLOCKS, **ROWS), *arrays)
        expected = values_and_gradients(partial(dense_attention, **ROWS), *arrays)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), found, expected)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(ROWS)]
    for found, right in zip(values_and_gradients(partial(BLOCKS, **ROWS), *arrays), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float32), right, atol=0.05)
    jaxpr = jax.make_jaxpr(partial(values_and_gradients, partial(BLOCKS, **ROWS)))(*arrays).jaxpr
    carried = [v.aval.dtype for loop in equations(jaxpr) if loop.primitive.name == "while" for v in loop.outvars]
    assert {dtype for dtype in carried if jnp.issubdtype(dtype, jnp.floating)} == {jnp.dtype("float32")}


def test_the_scale_of_scores_is_not_rounded_to_the_dtype_of_queries():
    query = jnp.asarray(np.random.default_rng(0).standard_normal((1000, 144)), jnp.bfloat16)
    wanted = np.asarray(query, np.float64) / 12
    # Each product is rounded once, up or down: the errors average out.
    assert abs(np.mean(np.asarray(scaled(query, None), np.float64) / wanted) - 1) < 2e-5


@pytest.mark.parametrize("options", [{}, GEMMA], ids=["plain", "gemma"])
def test_splash_gives_the_values_and_gradients_of_dense_attention(options):
    tokens = packed([5, 1, 40, 102, 200], [590], length=600)  # five tiles per row
    compare(partial(splash_attention, interpret=True, precision=HIGHEST), tokens, **options)


@pytest.mark.parametrize("window", [None, 5, 17])
def test_splash_computes_exactly_the_tiles_that_hold_a_visible_key(window):
    tokens = packed([16, 40, 8, 20], [84], [3] * 32, [], length=96)
    starts = segment_starts(tokens["segment_ids_RL"])
    schedule = jax.tree.map(np.asarray, tile_schedule(starts, 16, window))
    query, key = np.indices((4 * 96, 4 * 96))
    distance, start = query - key, np.asarray(starts).reshape(-1)
    visible = (start[query] == start[key]) & (distance >= 0) & (distance < (window or 1000))
    wanted = visible.reshape(24, 16, 24, 16).any((1, 3))
    by_query, by_key = np.zeros((2, 24, 24), int)
    for tile in range(24):
        np.add.at(by_query[tile], schedule.key_tiles[0, tile], schedule.key_tiles_needed[0, tile])
        np.add.at(by_key[:, tile], schedule.query_tiles[0, :, tile], schedule.query_tiles_needed[0, :, tile])
    np.testing.assert_array_equal(by_query, wanted)
    np.testing.assert_array_equal(by_key, wanted)
    assert schedule.key_tiles.dtype == np.int8


def test_every_matmul_of_splash_has_the_requested_precision():
    query, key, value, _ = draw(ROWS)
    attend = partial(splash_attention, precision=HIGHEST, **ROWS)
    text = str(jax.make_jaxpr(jax.grad(lambda *heads: attend(*heads).sum(), (0, 1, 2)))(query, key, value))
    # Two in the forward pass, four for the gradients of keys and values, three for queries, and the means.
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 10


def test_rows_are_padded_to_large_blocks_unless_that_adds_much_padding():
    assert [block_and_length(length) for length in (100, 500, 600, 2304, 2944, 8192, 8320)] == [
        (128, 128), (512, 512), (128, 640), (384, 2304), (512, 3072), (512, 8192), (512, 8704),
    ]  # fmt: skip


def test_triton_gives_the_values_and_gradients_of_dense_attention():
    tokens = packed([5, 1, 40, 102], [190], length=200)
    compare(partial(triton_attention, interpret=True), tokens, scale=0.7)


def test_triton_in_bfloat16_is_about_as_accurate_as_blocks():
    with jax.enable_x64(True):
        exact = jax.device_get(values_and_gradients(partial(dense_attention, **ROWS), *draw(ROWS, dtype=np.float64)))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(ROWS)]

    def errors(attend):
        found = values_and_gradients(partial(attend, **ROWS), *arrays)
        pairs = zip(found, exact, strict=True)
        return [np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other) for one, other in pairs]

    assert np.all(np.array(errors(partial(triton_attention, interpret=True))) < 2 * np.array(errors(BLOCKS)))


def test_a_token_sees_its_segment_from_its_start_or_from_its_windows_and_padding_itself():
    tokens = packed([3, 4], length=9)
    assert first_keys(*tokens.values(), None).tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 8]]
    assert first_keys(*tokens.values(), 2).tolist() == [[0, 0, 1, 3, 3, 4, 5, 7, 8]]


@needs_tokamax
@pytest.mark.parametrize("options", [{}, GEMMA], ids=["plain", "gemma"])
def test_mosaic_gives_the_values_and_gradients_of_dense_attention(options):
    with jax.numpy_rank_promotion("allow"):  # tokamax promotes ranks.
        compare(partial(mosaic_attention, interpret=True), ROWS, **options)


@needs_tokamax
@pytest.mark.parametrize("options", [{}, GEMMA], ids=["plain", "gemma"])
def test_mosaic_in_bfloat16_is_as_accurate_as_its_inputs(options):
    arrays = draw(ROWS)
    expected = values_and_gradients(partial(dense_attention, precision=HIGHEST, **ROWS, **options), *arrays)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    with jax.numpy_rank_promotion("allow"):  # tokamax promotes ranks.
        found = values_and_gradients(partial(mosaic_attention, interpret=True, **ROWS, **options), *rounded)
    for one, right in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        # A share of the largest value: bfloat16 keeps 8 bits, so inputs alone are off by up to 0.4 %.
        assert np.max(np.abs(np.asarray(one, np.float32) - right)) < 2e-2 * np.max(np.abs(right))
