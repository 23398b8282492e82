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
