import itertools
from types import SimpleNamespace

import jax
import pytest

from kto_jax.devices import chips
from kto_jax.devices.chips import CHIPS, find_chip, measured_matmul_rate, peak_flops


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5e", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v5p", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU7x", "tpu7x", 2307e12 / 2),  # Two JAX devices per chip.
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H100 PCIe", "h100_pcie", 756e12),
        ("NVIDIA H100 NVL", "h100_nvl", 835e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA B200", "b200", 2250e12),
    ],
)
def test_published_figures_are_those_of_the_device(kind, name, peak):
    assert find_chip(kind) is CHIPS[name]
    assert peak_flops(SimpleNamespace(device_kind=kind), "bfloat16") == (peak, "published")


def test_memory_and_bandwidths_are_in_bytes_and_grow_with_the_generations():
    for older, newer in (("v5e", "v6e"), ("v4", "v5p"), ("v5p", "tpu7x"), ("h100", "h200"), ("h200", "b200")):
        assert CHIPS[older].hbm_bytes < CHIPS[newer].hbm_bytes
        assert CHIPS[older].hbm_bandwidth < CHIPS[newer].hbm_bandwidth
    for chip in CHIPS.values():
        assert chip.hbm_bytes % 2**30 == 0
        assert chip.hbm_bandwidth > chip.ici_bandwidth > (chip.dcn_bandwidth or 0)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 4090", "TPU v3"])
def test_a_device_that_is_not_in_the_table_is_no_chip(kind):
    assert find_chip(kind) is None


def test_elsewhere_the_peak_is_measured_and_only_once():
    rate, source = peak_flops(jax.devices()[0], "float32")
    assert source == "measured"
    assert 1e8 < rate < 1e14
    assert peak_flops(jax.devices()[0], "float32") == (rate, "measured")


@pytest.mark.parametrize(("platform", "size", "products"), [("cpu", 2048, 1), ("gpu", 8192, 4), ("tpu", 8192, 4)])
def test_the_rate_counts_the_operations_of_products_sized_for_the_platform(monkeypatch, platform, size, products):
    monkeypatch.setattr(chips, "_fastest", lambda run: 0.5)
    shapes = []
    monkeypatch.setattr(jax, "device_put", lambda array, device: array)
    monkeypatch.setattr(
        chips.jnp, "full", lambda shape, value, dtype: shapes.append((shape, value)) or jax.numpy.eye(2)
    )
    rate = measured_matmul_rate.__wrapped__(SimpleNamespace(platform=platform), "float32")
    assert shapes == [((size, size), 1 / size)] and rate == products * 2 * size**3 / 0.5


@pytest.mark.parametrize(
    ("seconds", "num_runs", "fastest"),
    [
        ([0.1] * 5, 5, 0.1),
        ([0.1, 0.2, 0.2, 0.1, 0.05, 0.1, 0.1, 0.1, 0.0999], 9, 0.05),  # Four runs after the last faster one.
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 5, 0.5),  # No longer than two seconds once there are five.
    ],
)
def test_products_are_repeated_until_the_fastest_is_stable(seconds, num_runs, fastest):
    times, calls = iter(seconds), itertools.count()
    found = chips._fastest(lambda: (next(calls), next(times))[1])
    assert (next(calls), found) == (num_runs, fastest)
