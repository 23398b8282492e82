"""Granite: Llama with factors of the embedding, of attention's scores, of what each layer adds, and of the logits."""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_one_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER

_FACTORS = {
    "embed_scale": "embedding_multiplier", "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier", "logits_divisor": "logits_scaling",
}  # fmt: skip


def _read_granite(values: Values) -> dict[str, Any]:
    return read_one_rope(values) | {own: float(values[theirs]) for own, theirs in _FACTORS.items()}


def _write_granite(config: TransformerConfig) -> dict[str, Any]:
    factors = {theirs: getattr(config, own) for own, theirs in _FACTORS.items()}
    return write_one_rope(config) | factors | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


GRANITE = Family(
    name="granite",
    causal_lm="GraniteForCausalLM",
    classifier=None,
    read=_read_granite,
    write=_write_granite,
    tensors=DECODER,
    defaults={"bos_token_id": 1, "eos_token_id": 2} | dict.fromkeys(_FACTORS.values(), 1.0),
    options={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)
