"""Phi-3, Phi-3.5 and Phi-4: one matrix for queries, keys and values, and one for gate and up.

Phi-4-mini rotates three quarters of each head; longer contexts use longrope scaling.
"""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_partial_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER, LAYER, Tensor


def _read_phi3(values: Values) -> dict[str, Any]:
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rope = read_partial_rope(
        values, head_dim=head_dim, theta="rope_theta", share="partial_rotary_factor", default=1.0
    )  # fmt: skip
    return rope | {"window": values.get("sliding_window")}


def _write_phi3(config: TransformerConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    rotated = config.head_dim if config.rotary_dim is None else config.rotary_dim
    return write_one_rope(config) | {
        "hidden_act": "silu",
        # transformers' default, 32000, is refused in a smaller vocabulary. The tokenizer has its own.
        "pad_token_id": None,
        "sliding_window": config.window,
        "partial_rotary_factor": rotated / config.head_dim,
        # transformers reads it from here, not from rope_scaling.
        "original_max_position_embeddings": getattr(scaling, "original_max_length", config.max_length),
    }


_QKV = Tensor(LAYER + "self_attn.qkv_proj.weight", transposed=True, fused="blocks")
_GATE_UP = Tensor(LAYER + "mlp.gate_up_proj.weight", transposed=True, fused="blocks")
PHI3 = Family(
    name="phi3",
    causal_lm="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    read=_read_phi3,
    write=_write_phi3,
    tensors=DECODER
    | {f"layers.attention.{name}.weight": _QKV for name in ("query", "key", "value")}
    | {f"layers.mlp.{name}.weight": _GATE_UP for name in ("gate", "up")},
    defaults={
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 32000,
    },
    options={
        "partial_rotary_factor": (), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
        "lm_head_bias": (False,), "resid_pdrop": (0,), "embd_pdrop": (0,), "interpolate_factor": (1,),
        "full_attn_mod": (1,),
    },
)  # fmt: skip
