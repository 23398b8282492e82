"""The order of an epoch."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_jax.data.permutation import permute


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 9))
def test_the_order_of_an_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, (seed, epoch))) == list(range(size))


def test_the_order_looks_random_and_changes_with_seed_and_epoch():
    orders = [permute(np.arange(1000), 1000, key) for key in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.1
        assert (np.diff(order) == 1).sum() < 10
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10
    # Every position receives every value about equally often.
    first = [int(permute(np.array([0]), 8, (seed, 0))[0]) for seed in range(2000)]
    assert np.bincount(first, minlength=8).min() > 190
