"""A tiny config.json of every family, in which everything that the family adds has an effect."""

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WINDOW = 5
LENGTHS = (13, 17)
"""Of the sequences that models are compared on: the second exceeds the original context of some of them."""
NEOX = {
    name: value for name, value in TINY.items() if name not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")
} | {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "layer_norm_eps": 1e-5}
PHI = TINY | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}
LLAMA = TINY | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
FILES = {
    "mistral": TINY | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": TINY
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen2_window": TINY
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": TINY | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "gemma": TINY | GEMMA | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu"},
    "gemma2": TINY
    | GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": TINY
    | GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "mixtral": TINY
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
    },
    "qwen3_moe": TINY
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "router_aux_loss_coef": 0.001,
    },
    "olmoe": TINY
    | {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "pad_token_id": 0,  # by default 1, whose embedding has no gradient in torch
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    "phi3": PHI | {"sliding_window": WINDOW},
    "phi3_longrope": PHI
    | {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0]},
        "tie_word_embeddings": True,
    },
    "olmo2": TINY | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "pad_token_id": 0},
    "gpt_neox": NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 500.0, "use_parallel_residual": True},
    "gpt_neox_serial": NEOX
    | {
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_fast",
        "tie_word_embeddings": True,
    },
    "granite": TINY
    | {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 0.5,
        "tie_word_embeddings": True,
    },
    "starcoder2": {name: value for name, value in TINY.items() if name != "rms_norm_eps"}
    | {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "norm_epsilon": 1e-5,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "llama_yarn": LLAMA
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0}},
    "llama_dynamic": LLAMA | {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def _inside(file, **outer):
    """A model that also reads images, with this language model."""
    text = {name: value for name, value in file.items() if name not in ("architectures", "tie_word_embeddings")}
    return outer | {"text_config": text, "tie_word_embeddings": file["tie_word_embeddings"]}


MULTIMODAL_FILES = {
    "gemma3_multimodal": _inside(
        FILES["gemma3"],
        architectures=["Gemma3ForConditionalGeneration"],
        model_type="gemma3",
        mm_tokens_per_image=4,
        image_token_index=0,
        vision_config=VISION | {"model_type": "siglip_vision_model"},
    ),
    "mistral3_multimodal": _inside(
        FILES["mistral"] | {"head_dim": 8},
        architectures=["Mistral3ForConditionalGeneration"],
        model_type="mistral3",
        image_token_index=0,
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 16},
    ),
}
