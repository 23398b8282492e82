"""Peak performance of the hardware: published figures of each chip, and a measured matmul rate."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      kinds: prefixes of the `device_kind` that JAX reports for it.
      peak_flops: dense bfloat16 operations per second.
      hbm_bytes: capacity of its memory.
      hbm_bandwidth: memory bandwidth in bytes per second.
      ici_bandwidth: bytes per second that it can send over all its links to other chips of its slice or its NVLink
        domain, and receive at the same time.
      dcn_bandwidth: bytes per second to other slices; None if nothing is published.
      num_dims: dimensions of its TPU topologies; 0 for a GPU.
      devices: JAX devices per chip.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None = None
    num_dims: int = 0
    devices: int = 1


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x, read in 2026. Their interconnect figures count
# both directions, so half is used; v4 has 6 links of 50 GB/s (arXiv 2304.01433). The bandwidth of the data center
# network is per chip; for v5e it is the pod's 6.4 Tb/s divided by 256 chips.
# GPUs: NVIDIA's datasheets of the A100 (80 GB), the H100, the H200 and HGX B200: dense bfloat16, which is half of the
# figures with sparsity; NVLink counts both directions, so half is used.
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * _GIB, 1.2e12, 300e9, None, 3),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 200e9, 25e9 / 8, 2),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 600e9, 50e9 / 8, 3),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 400e9, 100e9 / 8, 2),
    "tpu7x": Chip(("TPU7x", "TPU v7x"), 2307e12, 192 * _GIB, 7380e9, 600e9, 100e9 / 8, 3, devices=2),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * _GIB, 2039e9, 300e9),
    "h100": Chip(("NVIDIA H100",), 989e12, 80 * _GIB, 3350e9, 450e9),
    "h100_pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 80 * _GIB, 2000e9, 300e9),
    "h100_nvl": Chip(("NVIDIA H100 NVL",), 835e12, 94 * _GIB, 3900e9, 300e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141 * _GIB, 4800e9, 450e9),
    "h200_nvl": Chip(("NVIDIA H200 NVL",), 835e12, 141 * _GIB, 4800e9, 450e9),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180 * _GIB, 7700e9, 900e9),
}

_SIZES = {"cpu": 2048}
_SIZE = 8192
"""Rows of the measured matrices: an accelerator needs large ones to reach its peak."""
_CHAINED = 4
"""Products per call on an accelerator, so that the overhead of a call is negligible."""
_FEWEST, _STABLE, _SECONDS = 5, 4, 2.0
"""Minimum number of calls; consecutive calls without a gain of 1 % that end the measurement; its limit in seconds."""


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None if it is not in `CHIPS`."""
    # The longest match: "TPU v5 lite" is not "TPU v5".
    matches = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """Peak rate of matrix products on one device: the denominator of model FLOP utilisation (MFU).

    Args:
      device: the device.
      dtype: the model's compute dtype.

    Returns:
      FLOP/s, and the source of the figure: "published" for bfloat16 on a known chip, otherwise "measured" with square
      matrix products of this dtype.
    """
    chip = find_chip(device.device_kind)
    if dtype == "bfloat16" and chip:
        return chip.peak_flops / chip.devices, "published"
    return measured_matmul_rate(device, dtype), "measured"


@functools.cache
def measured_matmul_rate(device: jax.Device, dtype: str) -> float:
    """FLOP/s of the fastest of several products of square matrices.

    Other work on the machine can only slow a product down, so products are repeated until the fastest is stable.
    """
    size = _SIZES.get(device.platform, _SIZE)
    num_products = 1 if device.platform == "cpu" else _CHAINED
    # A product of this matrix with itself is the matrix: a chain neither overflows nor vanishes.
    matrix = jax.device_put(jnp.full((size, size), 1 / size, dtype), device)

    @jax.jit
    def multiply(left: jax.Array) -> jax.Array:
        for _ in range(num_products):
            left = jnp.dot(left, matrix, precision=jax.lax.Precision.HIGHEST)
        return left

    multiply(matrix).block_until_ready()

    def run() -> float:
        start = time.perf_counter()
        multiply(matrix).block_until_ready()
        return time.perf_counter() - start

    return 2 * size**3 * num_products / _fastest(run)


def _fastest(run: Callable[[], float]) -> float:
    """The fastest of repeated runs, in seconds, once it is stable."""
    fastest, total, num_runs, num_stable = float("inf"), 0.0, 0, 0
    while num_runs < _FEWEST or (num_stable < _STABLE and total < _SECONDS):
        seconds = run()
        num_stable = 0 if seconds < 0.99 * fastest else num_stable + 1
        fastest, total, num_runs = min(fastest, seconds), total + seconds, num_runs + 1
    return fastest
