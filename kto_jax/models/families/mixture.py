"""Mixtures of experts: Mixtral, Qwen3-MoE and OLMoE (whose queries and keys have one norm over all heads)."""

from __future__ import annotations

from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.family import Family, Values
from kto_jax.models.families.rotary import read_one_rope, write_one_rope
from kto_jax.models.families.tensors import DECODER, LAYER, QK_NORMS, Tensor


def _read_experts(values: Values) -> dict[str, Any]:
    # transformers writes the number under either name.
    num_experts = values.get("num_local_experts")
    return read_one_rope(values) | {
        "num_experts": values["num_experts"] if num_experts is None else num_experts,
        "experts_per_token": values["num_experts_per_tok"],
        "balance_weight": float(values["router_aux_loss_coef"]),
    }


def _write_experts(config: TransformerConfig) -> dict[str, Any]:
    return write_one_rope(config) | {
        "hidden_act": "silu",
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.balance_weight,
    }


def _read_mixtral(values: Values) -> dict[str, Any]:
    return _read_experts(values) | {"window": values.get("sliding_window"), "shares_sum_to_one": True}


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    return _write_experts(config) | {"num_local_experts": config.num_experts, "sliding_window": config.window}


def _read_qwen3_moe(values: Values) -> dict[str, Any]:
    # Published files contain a window that the models do not use.
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    return _read_experts(values) | {
        "mlp_dim": values["moe_intermediate_size"],
        "shares_sum_to_one": bool(values["norm_topk_prob"]),
        "qk_norm": "head",
        "window": window,
    }


def _write_qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    return _write_experts(config) | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.mlp_dim,
        "norm_topk_prob": config.shares_sum_to_one,
        "attention_bias": False,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def _read_olmoe(values: Values) -> dict[str, Any]:
    return _read_experts(values) | {
        "shares_sum_to_one": bool(values["norm_topk_prob"]),
        "qk_norm": "whole",
    }


def _write_olmoe(config: TransformerConfig) -> dict[str, Any]:
    return _write_experts(config) | {
        "num_experts": config.num_experts,
        "norm_topk_prob": config.shares_sum_to_one,
        "attention_bias": False,
    }


_ATTENTION = {name: tensor for name, tensor in DECODER.items() if not name.startswith("layers.mlp.")}


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """Router and experts of a layer, from the names in its files."""
    names = {"gate": gate, "up": up, "down": down}
    return {"layers.mlp.router.weight": Tensor(LAYER + block + ".gate.weight", transposed=True)} | {
        f"layers.mlp.{name}.weight": Tensor(f"{LAYER}{block}.experts.{{}}.{theirs}.weight", transposed=True)
        for name, theirs in names.items()
    }


_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_SHARED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_bias": (False,)}
MIXTRAL = Family(
    name="mixtral",
    causal_lm="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    read=_read_mixtral,
    write=_write_mixtral,
    tensors=_ATTENTION | _experts("block_sparse_moe", "w1", "w3", "w2"),
    defaults={
        "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    options=_SHARED | {"router_jitter_noise": (0.0,)},
)  # fmt: skip
QWEN3_MOE = Family(
    name="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    tensors=_ATTENTION | QK_NORMS | _EXPERTS,
    defaults={
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
    },
    options=_SHARED | {"mlp_only_layers": ([],), "decoder_sparse_step": (1,), "max_window_layers": ()},
)  # fmt: skip
OLMOE = Family(
    name="olmoe",
    causal_lm="OlmoeForCausalLM",
    classifier=None,
    read=_read_olmoe,
    write=_write_olmoe,
    tensors=_ATTENTION | QK_NORMS | _EXPERTS,
    defaults={
        "eos_token_id": 50279, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
    },
    options=_SHARED | {"clip_qkv": (None,)},
)  # fmt: skip
