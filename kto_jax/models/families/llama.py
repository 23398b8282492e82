"""Llama (1 to 3.3, SmolLM2 and others), and Mistral, which adds a sliding window to all layers."""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_one_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    return write_one_rope(config) | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _read_mistral(values: Values) -> dict[str, Any]:
    return read_one_rope(values) | {"window": values.get("sliding_window")}


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return write_one_rope(config) | {"hidden_act": "silu", "sliding_window": config.window}


_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = Family(
    name="llama",
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    read=read_one_rope,
    write=_write_llama,
    tensors=DECODER,
    defaults=_DEFAULTS,
    options={"attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,), "hidden_act": ("silu",)},
)
MISTRAL = Family(
    name="mistral",
    causal_lm="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    read=_read_mistral,
    write=_write_mistral,
    tensors=DECODER,
    defaults={**_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    options={"hidden_act": ("silu",), "layer_types": (None,)},
)
