"""A tiny config.json of every family that GGUF files hold, as llama.cpp can compute it, without a tokenizer's sizes."""

from tests.models.families.family_files import FILES, WINDOW

_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": WINDOW}
GGUF_FILES = {
    "llama": FILES["llama_yarn"] | {"rope_scaling": None},
    "llama_linear": FILES["llama_yarn"] | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama_yarn": FILES["llama_yarn"],
    "mistral": FILES["mistral"] | {"sliding_window": None},
    "mixtral": FILES["mixtral"] | {"sliding_window": None},
    "qwen2": FILES["qwen2"],
    "qwen3": FILES["qwen3"],
    "qwen3_moe": FILES["qwen3_moe"],
    "olmoe": FILES["olmoe"] | {"num_key_value_heads": 4},
    "gemma": FILES["gemma"],
    "gemma2": FILES["gemma2"] | _GEMMA,
    "gemma3": FILES["gemma3"] | _GEMMA | {"sliding_window_pattern": 6, "num_hidden_layers": 7},
    "phi3": FILES["phi3"] | {"sliding_window": None},
    "phi3_longrope": FILES["phi3_longrope"]
    | {"rope_scaling": FILES["phi3_longrope"]["rope_scaling"] | {"attention_factor": 1.25}},
    "olmo2": FILES["olmo2"],
    "gpt_neox": FILES["gpt_neox"],
    "gpt_neox_serial": FILES["gpt_neox"] | {"use_parallel_residual": False, "rotary_pct": 1.0},
    "starcoder2": FILES["starcoder2"] | {"sliding_window": None},
    "granite": FILES["granite"],
}
