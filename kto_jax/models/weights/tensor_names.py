"""What Hugging Face calls each parameter."""

from __future__ import annotations

from kto_jax.models.config import TransformerConfig

_LAYER = "model.layers.{}."
# Our name -> (Hugging Face name, whether it is stored transposed). "{}" stands for the layer.
_NAMES = {
    "embed.table": ("model.embed_tokens.weight", False),
    "final_norm.scale": ("model.norm.weight", False),
    "head.weight": ("lm_head.weight", True),
    "layers.attention_norm.scale": (_LAYER + "input_layernorm.weight", False),
    "layers.attention.query.weight": (_LAYER + "self_attn.q_proj.weight", True),
    "layers.attention.query.bias": (_LAYER + "self_attn.q_proj.bias", False),
    "layers.attention.query_norm.scale": (_LAYER + "self_attn.q_norm.weight", False),
    "layers.attention.key.weight": (_LAYER + "self_attn.k_proj.weight", True),
    "layers.attention.key.bias": (_LAYER + "self_attn.k_proj.bias", False),
    "layers.attention.key_norm.scale": (_LAYER + "self_attn.k_norm.weight", False),
    "layers.attention.value.weight": (_LAYER + "self_attn.v_proj.weight", True),
    "layers.attention.value.bias": (_LAYER + "self_attn.v_proj.bias", False),
    "layers.attention.output.weight": (_LAYER + "self_attn.o_proj.weight", True),
    "layers.mlp_norm.scale": (_LAYER + "post_attention_layernorm.weight", False),
    "layers.mlp.gate.weight": (_LAYER + "mlp.gate_proj.weight", True),
    "layers.mlp.up.weight": (_LAYER + "mlp.up_proj.weight", True),
    "layers.mlp.down.weight": (_LAYER + "mlp.down_proj.weight", True),
    "scorer.weight": ("score.weight", False),  # [1, D] there, [D] here
}
# With norms on both sides, "post_attention" is the one behind attention, not the one before the feed-forward layer.
_BOTH_SIDES = {
    "layers.attention_post_norm.scale": (_LAYER + "post_attention_layernorm.weight", False),
    "layers.mlp_norm.scale": (_LAYER + "pre_feedforward_layernorm.weight", False),
    "layers.mlp_post_norm.scale": (_LAYER + "post_feedforward_layernorm.weight", False),
}


def tensor_names(config: TransformerConfig) -> dict[str, tuple[str, bool]]:
    """For every parameter its Hugging Face name, and whether it is stored transposed.

    Ours are "a.b.c" for params["a"]["b"]["c"]; "{}" in theirs stands for the layer. A model does not have all of the
    parameters that are named.
    """
    return _NAMES | (_BOTH_SIDES if config.post_norms else {})
