"""OLMo 2: norms after attention and feed-forward layer instead of before, and over all heads of queries and of keys."""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_one_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER, LAYER, QK_NORMS, Tensor


def _read_olmo2(values: Values) -> dict[str, Any]:
    return read_one_rope(values) | {"pre_norms": False, "post_norms": True, "qk_norm": "whole"}


def _write_olmo2(config: TransformerConfig) -> dict[str, Any]:
    return write_one_rope(config) | {"hidden_act": "silu", "attention_bias": False}


_PRE_NORMS = ("layers.attention_norm.scale", "layers.mlp_norm.scale")
OLMO2 = Family(
    name="olmo2",
    causal_lm="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    read=_read_olmo2,
    write=_write_olmo2,
    tensors={name: tensor for name, tensor in DECODER.items() if name not in _PRE_NORMS}
    | QK_NORMS
    | {
        "layers.attention_post_norm.scale": Tensor(LAYER + "post_attention_layernorm.weight"),
        "layers.mlp_post_norm.scale": Tensor(LAYER + "post_feedforward_layernorm.weight"),
    },
    defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50279},
    options={"hidden_act": ("silu",), "attention_bias": (False,)},
)
