"""Rotary settings in a config.json, and the scaling of rotary frequencies for longer contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kto_jax.config import ConfigError


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

    def scale_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        """All frequencies, divided by `factor`."""
        return frequencies / self.factor

    def to_hugging_face(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {"rope_type": "linear", "factor": self.factor}


Scaling = Llama3Scaling | LinearScaling
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


def read_rope(parameters: Mapping[str, Any], default_theta: Any) -> tuple[float, Scaling | None]:
    """Theta and scaling of one kind of layer.

    Args:
      parameters: `rope_parameters`, or `rope_scaling` in the older spelling.
      default_theta: the base, if `parameters` has none.

    Raises:
      ConfigError: the kind of scaling is not supported, or lacks a value.
    """
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"The model's rope_parameters differ by kind of layer ({', '.join(nested)}); only one set is supported for "
            "this architecture. Choose another model."
        )
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(
            f"The model's config.json has partial_rotary_factor={parameters['partial_rotary_factor']!r}; only 1 is "
            "supported. Choose a model without this option."
        )
    theta = parameters.get("rope_theta")
    theta = float(default_theta if theta is None else theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"The model's rotary embedding is scaled by {kind!r}; 'default', 'linear' and 'llama3' are supported. "
            "Choose a model with one of these."
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in names if parameters.get(name) is None]
    if missing:
        raise ConfigError(
            f"The model's {kind} rotary scaling lacks {', '.join(missing)}; it needs {', '.join(names)}. Fix its "
            "config.json."
        )
    if kind == "linear":
        return theta, LinearScaling(float(parameters["factor"]))
    factor, low, high, original = (parameters[name] for name in names)
    return theta, Llama3Scaling(float(factor), float(low), float(high), int(original))


def merge_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merges `rope_scaling` and `rope_parameters` of a config.json; the newer, `rope_parameters`, wins.

    Raises:
      ConfigError: they name different kinds of scaling.
    """
    older, newer = dict(values.get("rope_scaling") or {}), dict(values.get("rope_parameters") or {})
    kinds = [spelling.get("rope_type", spelling.get("type")) for spelling in (older, newer)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ConfigError(
            f"The model's config.json has a rope_scaling of {kinds[0]!r} and rope_parameters of {kinds[1]!r}. They "
            "must agree. Remove the wrong one."
        )
    return older | newer
