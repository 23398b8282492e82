"""What the hardware could do: the denominator of model FLOP utilisation."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# Published dense bf16 peaks of one device as JAX counts devices, in FLOP/s, by device_kind.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
_MATMUL_SIZE = 2048


def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """Peak rate of matrix products on one device.

    Args:
      device: the device.
      dtype: what the model computes in.

    Returns:
      FLOP/s, and where the figure comes from: "published" for bfloat16 on known hardware, else "measured" with a
      square matrix product of this dtype.
    """
    # The longest name that fits: "TPU v5 lite" is no "TPU v5".
    kind = max((kind for kind in _PEAKS if device.device_kind.startswith(kind)), key=len, default=None)
    if dtype == "bfloat16" and kind:
        return _PEAKS[kind], "published"
    return measured_matmul_rate(device, dtype), "measured"


@functools.cache
def measured_matmul_rate(device: jax.Device, dtype: str) -> float:
    """FLOP/s of the fastest of five products of two square matrices."""
    size = _MATMUL_SIZE
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a: jnp.dot(a, a, precision=jax.lax.Precision.HIGHEST))
    product(matrix).block_until_ready()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(matrix).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
