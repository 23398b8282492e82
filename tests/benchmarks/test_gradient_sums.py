"""The three ways of benchmarks/gradient_sums.py give one gradient."""

import jax
import numpy as np
import pytest

from benchmarks.gradient_sums import compiled_sums, rings, ways
from kto_jax.config import MeshConfig
from kto_jax.devices.sharding import make_mesh


def test_rings_of_a_torus_hold_every_device_once():
    assert rings((2, 3)) == [[[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]]]


def test_a_gradient_does_not_depend_on_how_its_sum_is_requested():
    random = np.random.default_rng(0)
    x, cotangent = random.standard_normal((16, 8), np.float32), random.standard_normal((16, 3), np.float32)
    for way in ways(make_mesh(MeshConfig(data=1, fsdp=8)), (2, 2, 2)).values():
        np.testing.assert_allclose(jax.jit(way)(x, cotangent), x.T @ cotangent, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_compiler_scatters_ring_by_ring_and_sums_whole_over_two_dimensions():
    pytest.importorskip("libtpu")
    sums = compiled_sums("v5e:8x8")
    assert [each.kind for each in sums["named"]] == ["all-reduce"]
    assert [(each.kind, each.num_devices) for each in sums["staged"]] == [("reduce-scatter", 8)] * 2
