"""Weights and architecture from a GGUF file, in Hugging Face's names and layout.

The file is memory-mapped, and only the requested rows are dequantised. llama.cpp permutes the rows of Llama's query and
key projections so that the pairs of the rotary embedding are adjacent; this module undoes the permutation.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.models.attention.dense import rotary_frequencies
from kto_jax.models.config import TransformerConfig
from kto_jax.models.rope import recover_scaling
from kto_jax.storage.gguf_files import open_gguf_file

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
"""llama3 scaling is stored as one factor per frequency."""


def open_gguf(path: Path) -> GgufWeights:
    """Opens a file, cached: parsing the vocabulary in its metadata takes seconds.

    Raises:
      ConfigError: as `GgufWeights`.
    """
    return _open_cached(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open_cached(path: Path, modified: int) -> GgufWeights:
    del modified  # Part of the key: a rewritten file is read again.
    return GgufWeights(path)


class GgufWeights:
    """The tensors of a GGUF file of a Llama-type model.

    Attributes:
      path: the file.
      config: the architecture, from the file's metadata.
      shapes: shape of every tensor by its Hugging Face name, [out, in] for projections.
    """

    def __init__(self, path: Path):
        """Opens a file and reads its metadata.

        Raises:
          ConfigError: it is not a GGUF file, or its architecture is not supported.
        """
        self.path = path
        reader = open_gguf_file(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        try:
            self.config = self._read_config(_Metadata(reader.fields, path))
        except ConfigError:
            raise
        except Exception as error:  # Values of any type and size may be in any field.
            raise ConfigError(
                f"{path} has metadata that describe no model ({type(error).__name__}: {error}). A .gguf file of a "
                "Llama-type model is needed. Download the file again."
            ) from error
        self._names = {_hugging_face_name(name): name for name in self._tensors if name != ROPE_FACTORS}
        self.shapes = {
            name: tuple(int(size) for size in reversed(self._tensors[own].shape)) for name, own in self._names.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises the part `index` of the tensor with this Hugging Face name, float32.

        Raises:
          ConfigError: the gguf package cannot dequantise the tensor.
        """
        from gguf import quants

        tensor = self._tensors[self._names[name]]
        rows: Any = index[0]
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if heads:
            rows = row_order(self.shapes[name][0], heads)[rows]
        try:
            values = quants.dequantize(np.ascontiguousarray(tensor.data[rows]), tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            raise ConfigError(
                f"{self.path}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantise; it can dequantise Q4_1, Q8_0, F16, F32 and most others. Choose another file of "
                "the same model."
            ) from error
        return values[(slice(None), *index[1:])]

    def _read_config(self, metadata: _Metadata) -> TransformerConfig:
        """The architecture, from metadata; vocabulary size and tied head from the tensors."""
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(
                f"{self.path} holds a model of architecture {architecture!r}; only 'llama' is supported. Choose a "
                "Llama-type model, or its Hugging Face directory."
            )
        if metadata.get("llama.expert_count", 0):
            raise ConfigError(
                f"{self.path} holds a mixture of experts (llama.expert_count); only dense models are read from .gguf "
                "files. Choose its Hugging Face directory."
            )
        num_heads = metadata.require("llama.attention.head_count")
        embed_dim = metadata.require("llama.embedding_length")
        eos_id = metadata.get("tokenizer.ggml.eos_token_id")
        if "token_embd.weight" not in self._tensors:
            raise ConfigError(
                f"{self.path} lacks the tensor token_embd.weight, which every model has. Download it again."
            )
        config = TransformerConfig(
            vocab_size=int(self._tensors["token_embd.weight"].shape[-1]),
            embed_dim=embed_dim,
            num_layers=metadata.require("llama.block_count"),
            num_heads=num_heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
            head_dim=metadata.get("llama.attention.key_length", embed_dim // num_heads),
            mlp_dim=metadata.require("llama.feed_forward_length"),
            max_length=metadata.get("llama.context_length", 2048),
            # Stored in float32; the model's value is the shortest decimal that rounds to it.
            norm_eps=float(str(np.float32(metadata.require("llama.attention.layer_norm_rms_epsilon")))),
            rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
            tied_head="output.weight" not in self._tensors,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=() if eos_id is None else (eos_id,),
        )
        return self._with_rope_scaling(config, metadata)

    def _with_rope_scaling(self, config: TransformerConfig, metadata: _Metadata) -> TransformerConfig:
        kind = metadata.get("llama.rope.scaling.type", "none")
        if kind != "none":
            raise ConfigError(
                f"{self.path}: rotary embedding is scaled by {kind!r}; none and llama3 are supported. Choose another "
                "model."
            )
        if ROPE_FACTORS not in self._tensors:
            return config
        factors = np.asarray(self._tensors[ROPE_FACTORS].data, np.float64)
        frequencies = rotary_frequencies(config)
        if factors.shape == frequencies.shape and np.all(factors == 1):
            return config
        scaling = recover_scaling(frequencies, factors) if factors.shape == frequencies.shape else None
        if scaling is None:
            raise ConfigError(
                f"{self.path}: the rotary factors in {ROPE_FACTORS} are those of no llama3 or linear scaling. Choose "
                "the model's Hugging Face directory instead, whose config.json states its scaling."
            )
        return dataclasses.replace(config, rope_scaling=scaling)


class _Metadata:
    """Lookups in a GGUF file's fields."""

    def __init__(self, fields: Mapping[str, Any], path: Path):
        self._fields, self._path = fields, path

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields[name].contents() if name in self._fields else default

    def require(self, name: str) -> Any:
        if name not in self._fields:
            raise ConfigError(
                f"{self._path} lacks the metadata {name}, which every Llama-type file has. Download it again."
            )
        return self.get(name)


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one keeps its name, and the comparison of names refuses it."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
    return OTHER_NAMES.get(name, name)


def row_order(num_rows: int, num_heads: int) -> np.ndarray:
    """The stored row of each row: the stored order has a head's pairs (i, i + H/2) adjacent."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
