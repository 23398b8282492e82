"""The scaling of rotary frequencies for longer contexts.

Linear, llama3 and YaRN scaling give one set of frequencies. Those of longrope and dynamic scaling depend on the length
of the sequence: each sequence of a packed row has the frequencies that it has in a row by itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling of the low frequencies of its rotary embedding.

    Attributes:
      factor: factor by which wavelengths longer than `original_max_length / low_freq_factor` grow.
      low_freq_factor: wavelengths above the context over this are scaled fully.
      high_freq_factor: wavelengths below the context over this are not scaled; those in between are interpolated.
      original_max_length: the model's context before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int
    attention_factor: ClassVar[float] = 1.0

    def scale_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides low frequencies by `factor`, keeps high ones, and interpolates in between."""
        turns = self.original_max_length * frequencies / (2 * np.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def to_hugging_face(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_length,
        }


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Scales all frequencies alike, as in the global layers of Gemma 3.

    Attributes:
      factor: of the wavelengths.
    """

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def scale_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        """All frequencies, divided by `factor`."""
        return frequencies / self.factor

    def to_hugging_face(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {"rope_type": "linear", "factor": self.factor}


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): low frequencies are divided, high ones kept, and cosines and sines grow.

    Attributes:
      factor: factor by which long wavelengths grow.
      original_max_length: the model's context before scaling, in tokens.
      attention_factor: factor of cosines and sines.
      beta_fast: frequencies that turn more often than this within the original context are kept.
      beta_slow: frequencies that turn less often than this are divided by `factor`; those in between are interpolated.
      truncate: whether the two bounds are rounded outwards to whole frequencies.
    """

    factor: float
    original_max_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides low frequencies by `factor`, keeps high ones, and interpolates in between."""
        size = 2 * len(frequencies)
        log_theta = -math.log(frequencies[-1]) * size / (size - 2)

        def place(turns: float) -> float:
            return size * math.log(self.original_max_length / (turns * 2 * math.pi)) / (2 * log_theta)

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        divided = np.clip((np.arange(len(frequencies)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        return divided * frequencies / self.factor + (1 - divided) * frequencies

    def to_hugging_face(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_length,
            "attention_factor": self.attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        }


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753), as in Phi-3: a divisor for each frequency, others for sequences of more tokens.

    Attributes:
      short_factors: divisors for sequences within the original context, [W/2].
      long_factors: divisors for longer ones, [W/2].
      original_max_length: the model's context before scaling, in tokens.
      attention_factor: factor of cosines and sines, for all lengths.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_length: int
    attention_factor: float

    def scale_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        """Those of sequences within the original context."""
        return frequencies / np.asarray(self.short_factors)

    def long_frequencies(self, frequencies: np.ndarray, lengths: jax.Array) -> jax.Array:
        """The frequencies of sequences of these lengths, which may exceed the original context."""
        long = jnp.asarray(frequencies / np.asarray(self.long_factors), lengths.dtype)
        short = jnp.asarray(self.scale_frequencies(frequencies), lengths.dtype)
        shape = (1,) * (lengths.ndim - 1) + (-1,)
        return jnp.where(lengths > self.original_max_length, long.reshape(shape), short.reshape(shape))

    def to_hugging_face(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {
            "rope_type": "longrope",
            "short_factor": list(self.short_factors),
            "long_factor": list(self.long_factors),
            "original_max_position_embeddings": self.original_max_length,
            "attention_factor": self.attention_factor,
        }


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK scaling: the base of the rotary embedding grows with a sequence beyond the original context.

    Attributes:
      factor: how fast it grows.
      original_max_length: the model's context, in tokens.
    """

    factor: float
    original_max_length: int
    attention_factor: ClassVar[float] = 1.0

    def scale_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        """Those of sequences within the original context: the frequencies themselves."""
        return frequencies

    def long_frequencies(self, frequencies: np.ndarray, lengths: jax.Array) -> jax.Array:
        """The frequencies of sequences of these lengths, which may exceed the original context."""
        growth = jnp.maximum(self.factor * lengths / self.original_max_length - (self.factor - 1), 1)
        places = jnp.arange(len(frequencies), dtype=lengths.dtype) / max(len(frequencies) - 1, 1)
        shape = (1,) * (lengths.ndim - 1) + (-1,)
        return jnp.asarray(frequencies, lengths.dtype).reshape(shape) * growth ** -places.reshape(shape)

    def to_hugging_face(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {"rope_type": "dynamic", "factor": self.factor}


LengthDependent = LongRopeScaling | DynamicScaling
Scaling = Llama3Scaling | LinearScaling | YarnScaling | LengthDependent
_ROUNDING = 1e-6
"""Relative error of a factor that is computed and stored in float32."""


def recover_scaling(frequencies: np.ndarray, factors: np.ndarray) -> Scaling | None:
    """The scaling that divides frequencies by these factors, as GGUF files keep it.

    Several settings of llama3 give the same factors: those of published models, `low_freq_factor` 1 and
    `high_freq_factor` 4, are preferred.

    Args:
      frequencies: unscaled, in radians per position, falling, [H/2].
      factors: of each, at least 1, [H/2].

    Returns:
      The scaling, or None if no llama3 or linear scaling has these factors.
    """
    factor = float(np.max(factors))
    factor = round(factor, 3) if np.isclose(factor, round(factor, 3), rtol=_ROUNDING) else factor
    if factor <= 1 or np.min(factors) < 1 - _ROUNDING:
        return None
    if np.allclose(factors, factor, rtol=_ROUNDING):
        return LinearScaling(factor)
    kept = np.clip((1 / factors - 1 / factor) / (1 - 1 / factor), 0, 1)
    kept = np.where(kept < 10 * _ROUNDING, 0.0, np.where(kept > 1 - 10 * _ROUNDING, 1.0, kept))
    for scaling in (*_usual_llama3(frequencies, kept, factor), *_any_llama3(frequencies, kept, factor)):
        if np.allclose(frequencies / scaling.scale_frequencies(frequencies), factors, rtol=2 * _ROUNDING):
            return scaling
    return None


def _usual_llama3(frequencies: np.ndarray, kept: np.ndarray, factor: float) -> list[Llama3Scaling]:
    """Scalings with the frequency factors 1 and 4 that keep about these shares of the frequencies."""
    lengths = 2 * np.pi * (1 + 3 * kept) / frequencies
    between = lengths[(kept > 0) & (kept < 1)]
    if len(between):
        return [Llama3Scaling(factor, 1.0, 4.0, round(float(between[-1])))]
    # The length is open; it is likely to be a power of two.
    middle = 0.5 * np.log2(lengths[kept == 1][-1:]) + 0.5 * np.log2(lengths[kept == 0][:1])
    return [Llama3Scaling(factor, 1.0, 4.0, round(2.0 ** float(power))) for power in (*np.round(middle), *middle)]


def _any_llama3(frequencies: np.ndarray, kept: np.ndarray, factor: float) -> list[Llama3Scaling]:
    """The scaling whose share kept is the line through the frequencies that are kept in part."""
    between = np.flatnonzero((kept > 0) & (kept < 1))
    before, behind = np.flatnonzero(kept == 1)[-1:], np.flatnonzero(kept == 0)[:1]
    anchor = between[-1] if len(between) else behind[0]
    others = between[:1] if len(between) > 1 else np.concatenate([before, behind])
    others = others[others != anchor]
    if not len(others):
        return []
    slope = np.max((kept[others] - kept[anchor]) / (frequencies[others] - frequencies[anchor]))
    start = kept[anchor] - slope * frequencies[anchor]
    if not start < 0 < slope:
        return []
    length = max(round(-2 * np.pi * slope / start), 1)
    width = length / (2 * np.pi * slope)
    return [Llama3Scaling(factor, float(-start * width), float((1 - start) * width), length)]
