"""GPT-NeoX and Pythia: LayerNorm and biases, a feed-forward layer without gate, beside attention rather than after it.

A quarter of each head is rotated. One matrix holds queries, keys and values, head by head.
"""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_partial_rope, write_one_rope
from kto_jax.models.families.tensors import Fused, Tensor

# "gelu_fast" and "gelu_new" are the tanh approximation.
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh"}
_SHARE, _THETA = "rotary_pct", "rotary_emb_base"


def _read_gpt_neox(values: Values) -> dict[str, Any]:
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    rope = read_partial_rope(values, head_dim=head_dim, theta=_THETA, share=_SHARE, default=0.25)
    return rope | {
        "activation": _ACTIVATIONS[values["hidden_act"]],
        "norm": "layer",
        "norm_eps": float(values["layer_norm_eps"]),
        "gated": False,
        "qkv_bias": bool(values["attention_bias"]),
        "output_bias": bool(values["attention_bias"]),
        "mlp_bias": True,
        "parallel_residual": bool(values["use_parallel_residual"]),
    }


def _write_gpt_neox(config: TransformerConfig) -> dict[str, Any]:
    rope = write_one_rope(config)
    rotated = config.head_dim if config.rotary_dim is None else config.rotary_dim
    return {
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_residual,
        _THETA: rope["rope_theta"],
        _SHARE: rotated / config.head_dim,
        "rope_scaling": rope["rope_scaling"],
    }


_LAYER = "gpt_neox.layers.{}."
_MATRICES = {
    "attention.query": "attention.query_key_value", "attention.key": "attention.query_key_value",
    "attention.value": "attention.query_key_value", "attention.output": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def _tensors() -> dict[str, Tensor]:
    found = {"embed.table": Tensor("gpt_neox.embed_in.weight")}
    for own, theirs in _NORMS.items():
        found[f"layers.{own}.scale"] = Tensor(f"{_LAYER}{theirs}.weight")
        found[f"layers.{own}.bias"] = Tensor(f"{_LAYER}{theirs}.bias")
    for own, theirs in _MATRICES.items():
        fused: Fused = "heads" if theirs.endswith("query_key_value") else "no"
        found[f"layers.{own}.weight"] = Tensor(f"{_LAYER}{theirs}.weight", transposed=True, fused=fused)
        found[f"layers.{own}.bias"] = Tensor(f"{_LAYER}{theirs}.bias", fused=fused)
    return found | {
        "final_norm.scale": Tensor("gpt_neox.final_layer_norm.weight"),
        "final_norm.bias": Tensor("gpt_neox.final_layer_norm.bias"),
        "head.weight": Tensor("embed_out.weight", transposed=True),
        "scorer.weight": Tensor("score.weight", is_row=True),
    }


GPT_NEOX = Family(
    name="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    read=_read_gpt_neox,
    write=_write_gpt_neox,
    tensors=_tensors(),
    defaults={
        "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
        "use_parallel_residual": True,
    },
    options={
        "hidden_act": tuple(_ACTIVATIONS), "attention_dropout": (0,), "hidden_dropout": (0,),
        # Neither is an entry of this family.
        "num_key_value_heads": (None,), "head_dim": (None,),
    },
    buffers=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    renamed={"lm_head.weight": "embed_out.weight"},
    omitted=("num_key_value_heads", "head_dim", "rms_norm_eps"),
)  # fmt: skip
