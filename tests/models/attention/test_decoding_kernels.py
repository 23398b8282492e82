"""The kernels of decoding, interpreted, compared with the attention over the whole cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kto_jax.models.attention.cached import cached_attention
from kto_jax.models.attention.flash_decoding import flash_decoding, splits_and_block
from kto_jax.models.attention.paged import page_size, paged_attention

HIGHEST = jax.lax.Precision.HIGHEST
# Idle, the first token, around the ends of a part and of a page; then the last position of the cache.
PLACES = (-1, 0, 127, 128)


def draw(length, heads=6, kv_heads=2, head_dim=128, dtype=np.float32):
    """Queries, keys and values, all of which bfloat16 holds: paged attention rounds keys and values to it."""
    random = np.random.default_rng(0)
    slots = len(PLACES) + 1
    query = random.standard_normal((slots, 1, heads, head_dim), np.float32)
    key, value = random.standard_normal((2, slots, kv_heads, length, head_dim), np.float32)
    positions = jnp.asarray([*PLACES, length - 1], jnp.int32)[:, None]
    rounded = (jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (query, key, value))
    return tuple(rounded), positions


def expected(arrays, positions, **options):
    wide = (x.astype(jnp.float32) for x in arrays)
    return np.asarray(cached_attention(*wide, positions_BL=positions, precision=HIGHEST, **options))[1:]


def by_paged(*arrays, **options):
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
        return paged_attention(*arrays, **options)


BY_FLASH = partial(flash_decoding, interpret=True)


def check(attend, arrays, positions, atol, **options):
    """Compares all slots but the idle one, whose value need only be finite."""
    found = np.asarray(attend(*arrays, positions_BL=positions, **options).astype(jnp.float32))
    right = expected(arrays, positions, **options)
    np.testing.assert_allclose(found[1:], right, rtol=1e-5, atol=atol * np.max(np.abs(right)))
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.7}], ids=["plain", "softcap"])
@pytest.mark.parametrize(("heads", "length"), [(2, 384), (6, 256), (16, 384)])
def test_paged_attention_is_that_over_the_whole_cache(heads, length, options):
    check(by_paged, *draw(length, heads=heads), 1e-5, **options)


@pytest.mark.parametrize("options", [{}, {"window": 140, "scale": 0.7}, {"window": 1}], ids=["plain", "window", "one"])
@pytest.mark.parametrize(("heads", "length"), [(2, 256), (40, 384)])
def test_flash_decoding_is_attention_over_the_whole_cache(heads, length, options):
    check(BY_FLASH, *draw(length, heads=heads, head_dim=64), 1e-5, **options)


@pytest.mark.parametrize("attend", [BY_FLASH, by_paged], ids=["flash", "paged"])
def test_keys_after_the_current_token_have_no_weight(attend):
    (query, key, value), positions = draw(384)
    unseen = np.arange(key.shape[2])[None, :] > np.asarray(positions)
    spoilt = [jnp.where(unseen[:, None, :, None], 1e9, x) for x in (key, value)]
    clean, dirty = (attend(query, *cache, positions_BL=positions) for cache in ((key, value), spoilt))
    np.testing.assert_array_equal(np.asarray(clean)[1:], np.asarray(dirty)[1:])


@pytest.mark.parametrize("attend", [BY_FLASH, by_paged], ids=["flash", "paged"])
def test_a_position_beyond_the_cache_sees_all_of_it(attend):
    arrays, positions = draw(256)
    ended = attend(*arrays, positions_BL=jnp.full_like(positions, 255))
    np.testing.assert_array_equal(attend(*arrays, positions_BL=jnp.full_like(positions, 5000)), ended)


@pytest.mark.parametrize("heads", [6, 16])
@pytest.mark.parametrize("attend", [BY_FLASH, by_paged], ids=["flash", "paged"])
def test_in_bfloat16_they_are_about_as_accurate_as_the_attention_over_the_whole_cache(attend, heads):
    arrays, positions = draw(384, heads=heads, dtype=jnp.bfloat16)
    right = expected(arrays, positions)

    def error(attend):
        found = attend(*arrays, positions_BL=positions)
        assert found.dtype == jnp.bfloat16
        return np.linalg.norm(np.asarray(found.astype(jnp.float32))[1:] - right)

    assert error(attend) < 1.5 * error(cached_attention)


def test_pages_splits_and_blocks_divide_the_cache_and_fit():
    assert [page_size(length) for length in (64, 192, 256, 1024, 1152)] == [64, 64, 256, 512, 128]
    assert [splits_and_block(length, 128) for length in (64, 192, 256, 1024, 8192, 1152)] == [
        (4, 16), (4, 16), (16, 16), (16, 64), (16, 128), (8, 16),
    ]  # fmt: skip
    assert splits_and_block(8192, 256) == (16, 64)
