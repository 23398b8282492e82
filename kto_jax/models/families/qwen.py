"""Qwen2 and Qwen2.5 (biases on queries, keys and values), and dense Qwen3 (norms of every query and key head)."""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values, read_layers, write_layers
from kto_jax.models.families.rotary import read_one_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER, QK_NORMS, QKV_BIASES


def _read_shared(values: Values) -> dict[str, Any]:
    # Published files contain a window that the models do not use.
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    first_local = values["max_window_layers"]
    return read_one_rope(values) | read_layers(
        values, window, lambda layer: window is not None and layer >= first_local
    )


def _write_shared(config: TransformerConfig) -> dict[str, Any]:
    local = config.layers_are_local
    layers = write_layers(config) | {
        "use_sliding_window": config.window is not None,
        "max_window_layers": local.index(True) if any(local) else config.num_layers,
    }
    return write_one_rope(config) | layers | {"hidden_act": "silu"}


def _read_qwen2(values: Values) -> dict[str, Any]:
    return _read_shared(values) | {"qkv_bias": True}


def _read_qwen3(values: Values) -> dict[str, Any]:
    return _read_shared(values) | {"qk_norm": "head"}


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    return _write_shared(config) | {"attention_bias": False}


_DEFAULTS = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
QWEN2 = Family(
    name="qwen2",
    causal_lm="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    read=_read_qwen2,
    write=_write_shared,
    tensors=DECODER | QKV_BIASES,
    defaults=_DEFAULTS,
    options={"hidden_act": ("silu",)},
)
QWEN3 = Family(
    name="qwen3",
    causal_lm="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    read=_read_qwen3,
    write=_write_qwen3,
    tensors=DECODER | QK_NORMS,
    defaults=_DEFAULTS | {"head_dim": 128},
    options={"hidden_act": ("silu",), "attention_bias": (False,)},
)
