from types import SimpleNamespace

import jax
import pytest

from kto_jax.devices.chips import peak_flops


@pytest.mark.parametrize("kind, peak", [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
])  # fmt: skip
def test_published_peaks_are_those_of_the_device(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind), "bfloat16") == (peak, "published")


def test_elsewhere_the_peak_is_measured():
    rate, source = peak_flops(jax.devices()[0], "float32")
    assert source == "measured"
    assert 1e8 < rate < 1e14
