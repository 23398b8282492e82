"""StarCoder2: Llama's order of blocks with LayerNorm, biases everywhere and a feed-forward layer without gate."""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_one_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER, LAYER, QKV_BIASES, Tensor


def _read_starcoder2(values: Values) -> dict[str, Any]:
    has_biases = bool(values["use_bias"])
    return read_one_rope(values) | {
        "activation": "gelu_tanh",
        "norm": "layer",
        "norm_eps": float(values["norm_epsilon"]),
        "gated": False,
        "qkv_bias": has_biases,
        "output_bias": has_biases,
        "mlp_bias": has_biases,
        "window": values.get("sliding_window"),
    }


def _write_starcoder2(config: TransformerConfig) -> dict[str, Any]:
    return write_one_rope(config) | {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": config.norm_eps,
        "use_bias": config.qkv_bias,
        "sliding_window": config.window,
    }


STARCODER2 = Family(
    name="starcoder2",
    causal_lm="Starcoder2ForCausalLM",
    classifier="Starcoder2ForSequenceClassification",
    read=_read_starcoder2,
    write=_write_starcoder2,
    tensors={name: tensor for name, tensor in DECODER.items() if not name.startswith("layers.mlp.")}
    | QKV_BIASES
    | {
        "final_norm.bias": Tensor("model.norm.bias"),
        "layers.attention_norm.bias": Tensor(LAYER + "input_layernorm.bias"),
        "layers.attention.output.bias": Tensor(LAYER + "self_attn.o_proj.bias"),
        "layers.mlp_norm.bias": Tensor(LAYER + "post_attention_layernorm.bias"),
        "layers.mlp.up.weight": Tensor(LAYER + "mlp.c_fc.weight", transposed=True),
        "layers.mlp.up.bias": Tensor(LAYER + "mlp.c_fc.bias"),
        "layers.mlp.down.weight": Tensor(LAYER + "mlp.c_proj.weight", transposed=True),
        "layers.mlp.down.bias": Tensor(LAYER + "mlp.c_proj.bias"),
    },
    defaults={
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "use_bias": True,
        "initializer_range": 0.018042, "bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": True,
    },
    options={"hidden_act": ("gelu_pytorch_tanh",), "residual_dropout": (0,), "embedding_dropout": (0,)},
    omitted=("rms_norm_eps",),
)  # fmt: skip
