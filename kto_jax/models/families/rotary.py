"""Rotary settings in a config.json, in either of transformers' spellings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, Scaling, YarnScaling

Values = Mapping[str, Any]
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""The kinds of scaling, and what each needs."""
_ALSO = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
_ANY = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def read_rope(
    parameters: Mapping[str, Any], default_theta: Any, *, max_length: Any, original: Any = None
) -> tuple[float, Scaling | None]:
    """Theta and scaling of one kind of layer.

    Args:
      parameters: `rope_parameters`, or `rope_scaling` in the older spelling.
      default_theta: the base, if `parameters` has none.
      max_length: `max_position_embeddings` of the model.
      original: `original_max_position_embeddings` outside of `parameters`, which takes precedence.

    Raises:
      ConfigError: the kind of scaling is not supported, lacks a value, or has one that it does not know.
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
    kind = "longrope" if kind == "su" else kind  # its name in Phi-3's first files
    _check_rope(kind, parameters)
    if original is None:
        original = parameters.get("original_max_position_embeddings")
    length = int(max_length if original is None else original)
    if kind == "linear":
        return theta, LinearScaling(float(parameters["factor"]))
    if kind == "dynamic":
        return theta, DynamicScaling(float(parameters["factor"]), int(max_length))
    if kind == "llama3":
        factor, low, high = (float(parameters[name]) for name in _NEEDED["llama3"][:3])
        return theta, Llama3Scaling(factor, low, high, int(parameters["original_max_position_embeddings"]))
    if kind == "yarn":
        return theta, _read_yarn(parameters, length)
    return theta, _read_longrope(parameters, length, max_length) if kind == "longrope" else None


def _check_rope(kind: Any, parameters: Mapping[str, Any]) -> None:
    if kind not in _NEEDED:
        raise ConfigError(
            f"The model's rotary embedding is scaled by {kind!r}; {', '.join(map(repr, _NEEDED))} are supported. "
            "Choose a model with one of these."
        )
    missing = [name for name in _NEEDED[kind] if parameters.get(name) is None]
    if missing:
        raise ConfigError(
            f"The model's {kind} rotary scaling lacks {', '.join(missing)}; it needs {', '.join(_NEEDED[kind])}. Fix "
            "its config.json."
        )
    known = {*_NEEDED[kind], *_ALSO.get(kind, ()), *_ANY}
    unknown = [f"{name}={value!r}" for name, value in parameters.items() if name not in known and value is not None]
    if unknown:
        raise ConfigError(
            f"The model's {kind} rotary scaling has {', '.join(unknown)}, which is not known; "
            f"{', '.join(sorted(known))} are. Choose another model, or remove it if it changes nothing."
        )


def _read_yarn(parameters: Mapping[str, Any], length: int) -> YarnScaling:
    factor = float(parameters["factor"])

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention, weights = parameters.get("attention_factor"), [parameters.get(n) for n in ("mscale", "mscale_all_dim")]
    if attention is None:
        attention = growth(weights[0]) / growth(weights[1]) if weights[0] and weights[1] else growth(1.0)
    truncate = parameters.get("truncate")
    return YarnScaling(
        factor, length, float(attention), float(parameters.get("beta_fast") or 32),
        float(parameters.get("beta_slow") or 1), True if truncate is None else bool(truncate),
    )  # fmt: skip


def _read_longrope(parameters: Mapping[str, Any], length: int, max_length: Any) -> LongRopeScaling:
    factor, attention = parameters.get("factor"), parameters.get("attention_factor")
    factor = max_length / length if factor is None else float(factor)
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    short, long = (tuple(map(float, parameters[name])) for name in _NEEDED["longrope"])
    return LongRopeScaling(short, long, length, float(attention))


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


def read_one_rope(values: Values) -> dict[str, Any]:
    """Rotary settings of a family whose layers all share them."""
    return _read_shared(values, merge_rope(values), values.get("rope_theta"))


def read_partial_rope(values: Values, *, head_dim: int, theta: str, share: str, default: float) -> dict[str, Any]:
    """As `read_one_rope`, for a family that may rotate only the first part of each head.

    Args:
      values: a config.json.
      head_dim: size of a head.
      theta: entry that holds the base.
      share: entry that holds the share of a head that is rotated.
      default: that share, if it is absent.
    """
    parameters = merge_rope(values)
    stated = [parameters.pop("partial_rotary_factor", None), values.get(share), default]
    size = int(head_dim * next(value for value in stated if value is not None))
    rotary_dim = {"rotary_dim": None if size == head_dim else size}
    return _read_shared(values, parameters, values.get(theta)) | rotary_dim


def _read_shared(values: Values, parameters: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    theta, scaling = read_rope(
        parameters, 10000.0 if theta is None else theta, max_length=values.get("max_position_embeddings"),
        original=values.get("original_max_position_embeddings"),
    )  # fmt: skip
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_one_rope(config: TransformerConfig) -> dict[str, Any]:
    """Rotary settings in the older spelling, which both older and newer readers accept."""
    scaling = config.rope_scaling
    return {"rope_theta": config.rope_theta, "rope_scaling": None if scaling is None else scaling.to_hugging_face()}
