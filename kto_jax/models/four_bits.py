"""A frozen model's matrices in four bits: an eighth of the memory of float32, and a scale for every 64 weights.

nf4 (QLoRA, arXiv 2305.14314) rounds each weight to one of 16 numbers, the quantiles of a normal distribution, times the
largest absolute weight of its block. int4 rounds to -7 ... 7 times a seventh of it. Blocks lie along a matrix's input,
as in bitsandbytes, so the codes of its nf4 files are ours.

A layer is dequantised where it is used, inside the scan over layers, as in int8.py.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kto_jax.config import ConfigError

BLOCK = 64
"""Weights that share a scale. A shorter input, or one that 64 does not divide, has blocks of a power of 2."""
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The numbers of nf4, in the order of their codes (arXiv 2305.14314, appendix E)."""
_LARGEST_INT4 = 7
_ZERO_INT4 = 8


class _Blocks(abc.ABC):
    """What both kinds share: two codes in a byte, the even row of a matrix in the upper half."""

    # Part of a tree's structure: JAX takes structures of two dataclasses for equal if their fields are, and would
    # sometimes run what was compiled for the other kind.
    kind: str
    shared: ClassVar[int] = -2
    scales: Any

    def __getitem__(self, _: Any) -> Any:
        # The modules read a whole parameter as `weight[...]`.
        return self

    @property
    def codes(self) -> Any:
        """The packed codes, [..., in / 2, out]."""
        return getattr(self, self.kind)

    def astype(self, dtype: Any) -> Array:
        """The matrix in `dtype`."""
        wide, codes = jnp.promote_types(dtype, jnp.float32), self.codes
        *stacked, half, size_out = codes.shape
        unpacked = jnp.stack([codes >> 4, codes & 15], axis=-2).reshape(*stacked, 2 * half, size_out)
        num_blocks = self.scales.shape[-2]
        scales = jnp.broadcast_to(
            self.scales[..., None, :].astype(wide), (*stacked, num_blocks, 2 * half // num_blocks, size_out)
        )
        return (self._levels(unpacked, wide) * scales.reshape(unpacked.shape)).astype(dtype)

    @abc.abstractmethod
    def _levels(self, codes: Array, wide: Any) -> Array:
        """What the codes stand for, before the scales."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4Matrix(_Blocks):
    """A matrix in nf4.

    Its fields are arrays, or what a tree of the same structure holds for each array (shapes, shardings, axes).

    Attributes:
      nf4: uint8 [..., in / 2, out], two codes in each.
      scales: float32 [..., blocks, out], the largest absolute weight of each block.
    """

    nf4: Any
    scales: Any
    kind: str = dataclasses.field(default="nf4", metadata={"static": True})

    def _levels(self, codes: Array, wide: Any) -> Array:
        # Selections by one bit after the other, because a gather of single numbers is slow on a TPU.
        levels: list[Any] = [jnp.asarray(level, wide) for level in NF4_LEVELS]
        for bit in range(4):
            is_set = (codes >> bit) & 1 == 1
            levels = [jnp.where(is_set, *pair) for pair in zip(levels[1::2], levels[::2], strict=True)]
        return levels[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Matrix(_Blocks):
    """A matrix in int4.

    Attributes:
      int4: uint8 [..., in / 2, out], two codes in each; a code is the integer plus 8.
      scales: float32 [..., blocks, out], what the integers of each block are multiplied by.
    """

    int4: Any
    scales: Any
    kind: str = dataclasses.field(default="int4", metadata={"static": True})

    def _levels(self, codes: Array, wide: Any) -> Array:
        return (codes.astype(jnp.int8) - _ZERO_INT4).astype(wide)


def quantise_nf4(weights: Array) -> Nf4Matrix:
    """Rounds a matrix [..., in, out] to nf4; halfway between two numbers, to the lower one, as bitsandbytes does.

    Raises:
      ConfigError: its input has an odd size.
    """
    blocks = _blocks(weights)
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    shares = blocks / jnp.where(largest == 0, 1, largest)
    levels = np.asarray(NF4_LEVELS)
    # The number of midpoints below a weight is the code of the level next to it.
    codes = sum((shares > middle).astype(jnp.uint8) for middle in ((levels[1:] + levels[:-1]) / 2).astype(np.float32))
    return Nf4Matrix(_packed(codes, weights.shape), jnp.squeeze(largest, -2))


def quantise_int4(weights: Array) -> Int4Matrix:
    """Rounds a matrix [..., in, out] to int4.

    Raises:
      ConfigError: its input has an odd size.
    """
    blocks = _blocks(weights)
    scales = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True) / _LARGEST_INT4
    integers = jnp.round(blocks / jnp.where(scales == 0, 1, scales))
    codes = (jnp.clip(integers, -_LARGEST_INT4, _LARGEST_INT4) + _ZERO_INT4).astype(jnp.uint8)
    return Int4Matrix(_packed(codes, weights.shape), jnp.squeeze(scales, -2))


def _blocks(weights: Array) -> Array:
    """[..., in, out] -> float32 [..., blocks, weights of a block, out]."""
    *stacked, size_in, size_out = weights.shape
    if size_in % 2:
        raise ConfigError(
            f"a matrix with an input of {size_in} cannot be kept in four bits, two weights to a byte. Allowed: even "
            'sizes. Set config.reference.param_dtype to "int8" or "bfloat16".'
        )
    return weights.astype(jnp.float32).reshape(*stacked, -1, math.gcd(size_in, BLOCK), size_out)


def _packed(codes: Any, shape: tuple[int, ...]) -> Array:
    """Codes in blocks, as bytes [..., in / 2, out]."""
    pairs = codes.reshape(*shape[:-2], shape[-2] // 2, 2, shape[-1])
    return pairs[..., 0, :] << 4 | pairs[..., 1, :]
