"""Gemma 1, 2 and 3 (text): norms of 1 + w, embeddings times sqrt(D), and from Gemma 2 on post-norms.

Gemma 2 soft-caps scores and logits, and every other layer is local. In Gemma 3 five layers of six are local, with their
own rotary embedding, and every query and key head has a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values, read_layers, write_layers
from kto_jax.models.families.rotary import merge_rope, read_one_rope, read_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER, LAYER, QK_NORMS, Tensor

_ACTIVATION = "gelu_pytorch_tanh"
_LOCAL_THETA, _GLOBAL_THETA, _PATTERN = 10000.0, 1000000.0, 6


def _read_gemma(values: Values) -> dict[str, Any]:
    return {"activation": "gelu_tanh", "norm_offset": 1.0, "embed_scale": float(values["hidden_size"]) ** 0.5}


def _read_gemma1(values: Values) -> dict[str, Any]:
    return _read_gemma(values) | read_one_rope(values)


def _write_gemma1(config: TransformerConfig) -> dict[str, Any]:
    # Older readers use `hidden_activation`, newer ones `hidden_act`.
    return write_one_rope(config) | {"hidden_act": _ACTIVATION, "hidden_activation": _ACTIVATION}


def _read_gemma2_or_3(values: Values) -> dict[str, Any]:
    """Fields that Gemma 2 and 3 share."""
    return _read_gemma(values) | {
        "post_norms": True,
        "query_pre_attn_scalar": values["query_pre_attn_scalar"],
        "final_softcap": values.get("final_logit_softcapping"),
    }


def _write_gemma2_or_3(config: TransformerConfig) -> dict[str, Any]:
    return write_layers(config) | {
        "hidden_activation": _ACTIVATION,
        "attention_bias": False,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "final_logit_softcapping": config.final_softcap,
        "attn_logit_softcapping": config.attention_softcap,
    }


def _read_gemma2(values: Values) -> dict[str, Any]:
    layers = read_layers(values, values.get("sliding_window"), lambda layer: layer % 2 == 0)
    softcap = {"attention_softcap": values.get("attn_logit_softcapping")}
    return _read_gemma2_or_3(values) | read_one_rope(values) | layers | softcap


def _write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    return _write_gemma2_or_3(config) | write_one_rope(config)


def _read_gemma3(values: Values) -> dict[str, Any]:
    pattern = values.get("sliding_window_pattern") or _PATTERN
    layers = read_layers(values, values.get("sliding_window"), lambda layer: (layer + 1) % pattern != 0)
    fields = _read_gemma2_or_3(values) | _read_ropes(values) | layers | {"qk_norm": "head"}
    return fields if layers.get("window") is not None else fields | {"local_rope_theta": None}


def _read_ropes(values: Values) -> dict[str, Any]:
    """Rotary settings of the two kinds of layers, from either spelling."""
    newer = values.get("rope_parameters") or {}
    if newer and not any(isinstance(newer.get(kind), Mapping) for kind in ("full_attention", "sliding_attention")):
        raise ConfigError(
            "The model's rope_parameters name no kind of layer; Gemma 3 needs them for full_attention and "
            "sliding_attention. Fix its config.json."
        )
    global_theta, local_theta = values.get("rope_theta"), values.get("rope_local_base_freq")
    theta, scaling = read_rope(
        merge_rope({"rope_scaling": values.get("rope_scaling"), "rope_parameters": newer.get("full_attention")}),
        _GLOBAL_THETA if global_theta is None else global_theta,
        max_length=values["max_position_embeddings"],
        original=values.get("original_max_position_embeddings"),
    )
    local_theta, local_scaling = read_rope(
        newer.get("sliding_attention") or {},
        _LOCAL_THETA if local_theta is None else local_theta,
        max_length=values["max_position_embeddings"],
    )
    if local_scaling is not None:
        raise ConfigError(
            f"The model scales the rotary embedding of local layers by {local_scaling.to_hugging_face()}; only global "
            "layers may be scaled. Choose another model."
        )
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}


def _write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    local = config.layers_are_local
    pattern = local.index(False) + 1 if not all(local) else config.num_layers + 1
    regular = all(is_local is bool((layer + 1) % pattern) for layer, is_local in enumerate(local))
    # Readers that do not know `layer_types` use the pattern.
    values = _write_gemma2_or_3(config) | write_one_rope(config) | {"rope_local_base_freq": config.local_rope_theta}
    return values | ({"sliding_window_pattern": pattern} if regular else {})


# Gemma's "post_attention" norm follows attention; in other families that name precedes the feed-forward layer.
_POST_NORMS = {
    "layers.attention_post_norm.scale": Tensor(LAYER + "post_attention_layernorm.weight"),
    "layers.mlp_norm.scale": Tensor(LAYER + "pre_feedforward_layernorm.weight"),
    "layers.mlp_post_norm.scale": Tensor(LAYER + "post_feedforward_layernorm.weight"),
}
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_OPTIONS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "use_bidirectional_attention": (False,)}
GEMMA1 = Family(
    name="gemma",
    causal_lm="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    read=_read_gemma1,
    write=_write_gemma1,
    tensors=DECODER,
    defaults={**_DEFAULTS, "num_key_value_heads": 16},
    # The first release's files say "gelu", but its models were trained with the tanh approximation.
    options={**_OPTIONS, "hidden_act": (_ACTIVATION, "gelu"), "hidden_activation": (_ACTIVATION,)},
)
GEMMA2 = Family(
    name="gemma2",
    causal_lm="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    read=_read_gemma2,
    write=_write_gemma2,
    tensors=DECODER | _POST_NORMS,
    defaults={
        **_DEFAULTS,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    # Files hold `hidden_act` too, which transformers' Gemma 2 ignores, and the first ones the window twice.
    options={
        **_OPTIONS,
        "hidden_activation": (_ACTIVATION,),
        "hidden_act": (_ACTIVATION,),
        "sliding_window_size": (4096,),
    },
)
GEMMA3 = Family(
    name="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    read=_read_gemma3,
    write=_write_gemma3,
    tensors=DECODER | _POST_NORMS | QK_NORMS,
    defaults={**_DEFAULTS, "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    # transformers' Gemma 3 ignores this entry and does not soft-cap its scores.
    options={**_OPTIONS, "hidden_activation": (_ACTIVATION,), "attn_logit_softcapping": (None,)},
)
