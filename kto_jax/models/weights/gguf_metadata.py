"""The architecture of a model as the metadata of a GGUF file, in both directions.

Both go through the entries of a config.json, so what a family takes for granted is said in one place, families/.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.models.attention.dense import rotary_frequencies
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling, recover_scaling
from kto_jax.models.weights.gguf_layout import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, Layout

_NEEDED = (
    "embedding_length", "block_count", "feed_forward_length", "attention.head_count", "expert_used_count",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.scale",
)  # fmt: skip
"""Keys whose absence is a damaged file, in the architectures that have them."""
_WITHOUT_EFFECT = frozenset([
    "vocab_size", "tensor_data_layout", "attention.causal", "rope.scaling.finetuned", "mm.tokens_per_image",
    "rope.scaling.original_context_length", "expert_feed_forward_length",
])  # fmt: skip
_NOT_ARCHITECTURE = ("family", "initializer_range", "bos_id", "eos_ids", "balance_weight")
"""Fields that do not change what is computed, or that the tokenizer's part of a file states."""
_FLOAT32 = 1e-6
"""Relative error of a number that is kept in float32."""


class Metadata:
    """Lookups in the metadata of one architecture; remembers which keys were read.

    Attributes:
      path: the file, for messages.
      architecture: llama.cpp's name.
    """

    def __init__(self, values: Mapping[str, Any], path: Any, architecture: str):
        """Takes the values by their keys without the architecture's name."""
        self._values, self.path, self.architecture = values, path, architecture
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value; floats, which are kept in float32, as the shortest decimal that rounds to them."""
        self._read.add(key)
        value = self._values.get(key, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def require(self, key: str) -> Any:
        """As `get`.

        Raises:
          ConfigError: there is no such key.
        """
        if key not in self._values:
            raise ConfigError(
                f"{self.path} lacks the metadata {self.architecture}.{key}, which every file of this architecture has. "
                "Download it again."
            )
        return self.get(key)

    def unknown(self) -> list[str]:
        """The keys, with values, that were not read and may change what is computed; null, false and 0 do not."""
        others = self._values.keys() - self._read - _WITHOUT_EFFECT
        return [f"{key}={self._values[key]!r}"[:80] for key in sorted(others) if self._values[key] not in (None, 0, "")]


def write_metadata(config: TransformerConfig, layout: Layout) -> dict[str, Any]:
    """The metadata of a model, by keys without the architecture's name."""
    values = write_config_json(config)
    stated = {key: values.get(entry) for key, entry in layout.keys.items()}
    if "window" in layout.unused:
        stated["attention.sliding_window"] = config.window or 0  # 0, as converted Phi-4 has it, for none
    stated |= {
        "vocab_size": config.vocab_size,
        "attention.value_length": stated.get("attention.key_length"),
        "rope.dimension_count": config.head_dim if config.rotary_dim is None else config.rotary_dim,
    }
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        stated |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        stated |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_max_length,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    if isinstance(scaling, LongRopeScaling):
        stated |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": scaling.attention_factor}
    return {key: value for key, value in stated.items() if value is not None}


def rope_tensors(config: TransformerConfig, layout: Layout) -> dict[str, np.ndarray]:
    """The scaling of rotary frequencies, as far as it is kept in tensors."""
    scaling = config.rope_scaling
    if isinstance(scaling, Llama3Scaling) and layout.architecture == "llama":
        plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
        return {ROPE_FACTORS: (plain / rotary_frequencies(config)).astype(np.float32)}
    if isinstance(scaling, LongRopeScaling) and layout.architecture == "phi3":
        factors = {LONG_FACTORS: scaling.long_factors, SHORT_FACTORS: scaling.short_factors}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    return {}


def read_metadata(
    metadata: Metadata, layout: Layout, *, vocab_size: int, tied_head: bool, factors: Mapping[str, np.ndarray]
) -> TransformerConfig:
    """The architecture that a file describes.

    Args:
      metadata: of the file.
      layout: of the file's architecture.
      vocab_size: rows of the embedding.
      tied_head: whether there is no output head.
      factors: the tensors of `rope_tensors` that the file has.

    Raises:
      ConfigError: a key is missing, unknown or of a value that is not supported.
    """
    read = {entry: (metadata.require if key in _NEEDED else metadata.get)(key) for key, entry in layout.keys.items()}
    heads, width = read["num_attention_heads"], read["hidden_size"]
    head_dim = read["head_dim"] = read.get("head_dim") or width // heads
    values = {name: value for name, value in read.items() if value is not None} | dict(layout.fixed)
    values |= {"vocab_size": vocab_size, "tie_word_embeddings": tied_head, "model_type": layout.family}
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    values.setdefault("max_position_embeddings", 2048)
    theta = layout.keys["rope.freq_base"]
    values.setdefault(theta, 10000.0)
    if "num_key_value_heads" in read:
        values.setdefault("num_key_value_heads", heads)
    else:
        del values["head_dim"]
    if read.get("sliding_window", 0) == 0:  # Also of an architecture that has no such key.
        values["sliding_window"] = None
    if layout.deep is not None:
        is_deep = values["num_hidden_layers"] == layout.deep
        values["query_pre_attn_scalar"] = width // heads if is_deep else head_dim
    rotated, value_dim = metadata.get("rope.dimension_count", head_dim), metadata.get("attention.value_length")
    if layout.share is not None:
        values[layout.share] = rotated / head_dim
    if (layout.share is None and rotated != head_dim) or value_dim not in (None, head_dim):
        raise ConfigError(
            f"{metadata.path}: heads of {head_dim} have {rotated} rotated dimensions and values of "
            f"{value_dim or head_dim}; all must be equal in this architecture. Choose another model."
        )
    values["rope_scaling"] = _read_scaling(metadata, factors)
    _refuse_unknown(metadata)
    config = read_config_json(values)
    return _with_factors(config, metadata, factors.get(ROPE_FACTORS)) if config.rope_scaling is None else config


def differences(config: TransformerConfig, layout: Layout) -> list[str]:
    """What llama.cpp would compute otherwise, reading the file that would be written of this model."""
    tied = {"tied": True, "own": False}.get(layout.head, config.tied_head)
    given = config
    if config.window is not None and config.window >= config.max_length:  # No sequence is longer.
        given = dataclasses.replace(config, window=None, local_layers=())
    if isinstance(given.rope_scaling, Llama3Scaling) and layout.architecture == "llama":
        given = dataclasses.replace(given, rope_scaling=None)  # Kept in a tensor, which states no settings.
    written = {key: _in_float32(value) for key, value in write_metadata(given, layout).items()}
    metadata = Metadata(written, "the file", layout.architecture)
    back = read_metadata(
        metadata, layout, vocab_size=given.vocab_size, tied_head=tied, factors=rope_tensors(given, layout)
    )
    found = []
    for field in dataclasses.fields(given):
        own, theirs = getattr(given, field.name), getattr(back, field.name)
        theirs = None if field.name in layout.unused else theirs
        if field.name not in _NOT_ARCHITECTURE and not _is_close(_plain(own), _plain(theirs)):
            found.append(f"{field.name}={_plain(own)!r}, where llama.cpp takes {_plain(theirs)!r}")
    return found


def _in_float32(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    return value.to_hugging_face() if hasattr(value, "to_hugging_face") else value


def _is_close(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_close(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_FLOAT32)
    return one == other


def _read_scaling(metadata: Metadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json."""
    factor = metadata.get("rope.scaling.factor")
    kind = metadata.get("rope.scaling.type", "linear" if factor not in (None, 0.0, 1.0) else "none")
    if kind in ("none", "longrope") and LONG_FACTORS in factors and SHORT_FACTORS in factors:
        short, long = ([float(str(one)) for one in factors[name]] for name in (SHORT_FACTORS, LONG_FACTORS))
        attention = metadata.get("rope.scaling.attn_factor")
        return {"type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.require("rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": metadata.require("rope.scaling.factor"),
            "original_max_position_embeddings": metadata.require("rope.scaling.original_context_length"),
            "beta_fast": metadata.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": metadata.get("rope.scaling.yarn_beta_slow"),
        }
    if kind != "none":
        raise ConfigError(
            f"{metadata.path}: rotary embedding is scaled by {kind!r}; none, linear, yarn, llama3 and (in Phi-3) "
            "longrope are supported. Choose another model."
        )
    return None


def _refuse_unknown(metadata: Metadata) -> None:
    unknown = metadata.unknown()
    if unknown:
        raise ConfigError(
            f"{metadata.path} has the metadata {', '.join(unknown)}, which is not known of the architecture "
            f"{metadata.architecture!r}, so the model may compute something else than it would here. Every key must be "
            "known. Choose the model's Hugging Face directory."
        )


def _with_factors(config: TransformerConfig, metadata: Metadata, stored: np.ndarray | None) -> TransformerConfig:
    """With the scaling whose factors the file holds."""
    if stored is None:
        return config
    factors, frequencies = np.asarray(stored, np.float64), rotary_frequencies(config)
    if factors.shape == frequencies.shape and np.all(factors == 1):
        return config
    scaling = recover_scaling(frequencies, factors) if factors.shape == frequencies.shape else None
    if scaling is None:
        raise ConfigError(
            f"{metadata.path}: the rotary factors in {ROPE_FACTORS} are those of no llama3 or linear scaling. Choose "
            "the model's Hugging Face directory instead, whose config.json states its scaling."
        )
    return dataclasses.replace(config, rope_scaling=scaling)
