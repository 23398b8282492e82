"""How llama.cpp keeps the models of each family in a GGUF file: what its metadata state, names, and order of rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import FAMILIES

ROPE_FACTORS = "rope_freqs.weight"
"""llama3 scaling is stored as one factor per frequency."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""longrope's divisors."""
_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
}  # fmt: skip
_USUAL = _SIZES | {
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
}  # fmt: skip
_EXPERTS = _USUAL | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFTCAP = {"final_logit_softcapping": "final_logit_softcapping"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family's models in GGUF files.

    Attributes:
      architecture: llama.cpp's name, which begins the keys of the metadata.
      family: the family's `model_type`.
      keys: what the metadata state, each with the entry of config.json of that meaning.
      fixed: entries of config.json that llama.cpp takes for granted.
      share: the entry of config.json for the share of a head that is rotated, if it may be less than 1.
      deep: the number of layers from which on scores are scaled by embed_dim / num_heads instead of head_dim: llama.cpp
        tells Gemma's largest models by it.
      pairs_adjacent: whether queries and keys are stored with the pairs of the rotary embedding adjacent.
      head: whether a file may hold an output head: "any", only one "tied" to the embedding, or needs its "own".
      unused: fields of TransformerConfig that a file states and llama.cpp does not use.
    """

    architecture: str
    family: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    share: str | None = None
    deep: int | None = None
    pairs_adjacent: bool = False
    head: Literal["any", "tied", "own"] = "any"
    unused: tuple[str, ...] = ()

    def stored_names(self, num_layers: int) -> Callable[[str], Any]:
        """The function that gives llama.cpp's name of a tensor, from its Hugging Face name; None if there is none.

        The experts of a layer share one.
        """
        import gguf

        number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == self.architecture)
        names = gguf.get_tensor_name_map(number, num_layers)

        def stored_name(name: str) -> str | None:
            return names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", name), try_suffixes=(".weight", ".bias"))

        return stored_name

    def templates(self) -> dict[str, str]:
        """The tensors of the family: Hugging Face's names by llama.cpp's, with {} for layer and expert in both."""
        found, stored_name = {}, self.stored_names(1)
        for tensor in FAMILIES[self.family].tensors.values():
            stored = stored_name(tensor.name.replace("{}", "0"))
            if stored is not None:
                found[stored.replace("blk.0.", "blk.{}.")] = tensor.name
        return found

    def row_order(self, name: str, config: TransformerConfig) -> np.ndarray | None:
        """The stored row of each row of a tensor with this Hugging Face name; None if their order is the same."""
        module = name.split(".")[-2]
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module)
        if self.pairs_adjacent and heads:
            return pair_order(heads, config.head_dim)
        if module == "query_key_value":  # Hugging Face: head by head; here: queries, keys, values.
            parts = np.arange(3 * config.num_heads * config.head_dim).reshape(3, config.num_heads, config.head_dim)
            return parts.swapaxes(0, 1).reshape(-1)
        return None

    def offset(self, name: str, config: TransformerConfig) -> float:
        """What the stored values of a tensor have in addition: Gemma's norms are stored as they are used, 1 + w."""
        return config.norm_offset if name.endswith("norm.weight") else 0.0


def pair_order(num_heads: int, head_dim: int) -> np.ndarray:
    """The stored row of each row: the stored order has a head's pairs (i, i + H/2) adjacent."""
    return np.arange(num_heads * head_dim).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


_LAYOUTS = (
    Layout("llama", "llama", _USUAL, pairs_adjacent=True),
    Layout("llama", "mistral", _USUAL, pairs_adjacent=True),
    Layout(
        "llama",
        "mixtral",
        _USUAL | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        pairs_adjacent=True,
    ),
    Layout("qwen2", "qwen2", _USUAL),
    Layout("qwen3", "qwen3", _USUAL),
    Layout(
        "qwen3moe",
        "qwen3_moe",
        _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        fixed={"norm_topk_prob": True},
    ),
    Layout("olmoe", "olmoe", _EXPERTS, fixed={"norm_topk_prob": False}),
    Layout("gemma", "gemma", _USUAL, head="tied"),
    Layout(
        "gemma2",
        "gemma2",
        _USUAL | _WINDOW | _SOFTCAP | {"attn_logit_softcapping": "attn_logit_softcapping"},
        deep=46,
        head="tied",
    ),
    Layout(
        "gemma3",
        "gemma3_text",
        _USUAL | _WINDOW | _SOFTCAP | {"rope.freq_base_swa": "rope_local_base_freq"},
        deep=62,
    ),
    Layout(
        "phi3",
        "phi3",
        _USUAL | _WINDOW | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
        share="partial_rotary_factor",
        unused=("window",),
    ),
    Layout("olmo2", "olmo2", _USUAL),
    Layout(
        "gptneox",
        "gpt_neox",
        _SIZES
        | {
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "rope.freq_base": "rotary_emb_base",
            "use_parallel_residual": "use_parallel_residual",
        },
        share="rotary_pct",
        head="own",
    ),
    Layout(
        "starcoder2",
        "starcoder2",
        {key: entry for key, entry in _USUAL.items() if entry != "rms_norm_eps"}
        | {"attention.layer_norm_epsilon": "norm_epsilon"},
    ),
    Layout(
        "granite",
        "granite",
        _USUAL
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        pairs_adjacent=True,
    ),
)
LAYOUTS: dict[str, Layout] = {layout.family: layout for layout in _LAYOUTS}
ARCHITECTURES = tuple(dict.fromkeys(layout.architecture for layout in _LAYOUTS))


def find_layout(architecture: str, *, has_experts: bool) -> Layout | None:
    """The layout of a file's architecture; None if it is not supported. llama.cpp's "llama" includes Mixtral."""
    if architecture == "llama" and has_experts:
        return LAYOUTS["mixtral"]
    return next((layout for layout in _LAYOUTS if layout.architecture == architecture), None)
