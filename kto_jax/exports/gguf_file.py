"""A model directory as one GGUF file with its tokenizer, in the layout that llama.cpp reads.

Models of the Llama type, Qwen2, Qwen3, Qwen3-MoE and Phi-3 with byte-level BPE tokenizers are written; others are
refused by name. Matrices get the chosen kind; norms, biases and routers stay float32. The experts of a layer are one
tensor. What is read of such files is in models/weights/gguf.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.config.packages import require
from kto_jax.data.tokens import tokenizer_files
from kto_jax.data.tokens.gguf_tokenizer import name_pre_tokenizer
from kto_jax.models.attention.dense import rotary_frequencies
from kto_jax.models.config import TransformerConfig
from kto_jax.models.rope import LinearScaling, Llama3Scaling
from kto_jax.models.weights.gguf import ROPE_FACTORS, row_order
from kto_jax.models.weights.load import is_reward_model, open_weights, read_config
from kto_jax.models.weights.safetensors_files import Weights
from kto_jax.models.weights.tensors import expected_shapes
from kto_jax.storage.atomic import new_file

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""llama.cpp's numbers of the kinds (general.file_type)."""
_ARCHITECTURES: dict[str, tuple[str, frozenset[str]]] = {
    "llama": ("llama", frozenset()),
    "mistral": ("llama", frozenset()),
    "qwen2": ("qwen2", frozenset({"qkv_bias"})),
    "qwen3": ("qwen3", frozenset({"qk_norm"})),
    "qwen3_moe": ("qwen3moe", frozenset({"qk_norm", "num_experts", "experts_per_token", "balance_weight"})),
    "phi3": ("phi3", frozenset({"rotary_dim"})),
}
"""llama.cpp's name of each family that is written, and the fields in which it differs from Llama."""
_SIZES = (
    "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_length",
    "norm_eps", "rope_theta", "tied_head", "initializer_range", "bos_id", "eos_ids",
)  # fmt: skip
"""What a GGUF file of the Llama type states, or need not."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_OTHERWISE = "Export a Hugging Face directory, without --gguf, and convert that with llama.cpp."


def write_gguf(file: Path, directory: Path, kind: str, *, name: str) -> None:
    """Writes a model directory as a GGUF file.

    Args:
      file: the path; an existing file is replaced.
      directory: a Hugging Face directory with weights and tokenizer.
      kind: "q8_0", "f16", "bf16" or "f32": what matrices are kept in. Rows whose length is not a multiple of 32 are
        kept in f16 if q8_0 is chosen.
      name: the model's name in the file.

    Raises:
      ConfigError: the architecture or the tokenizer is of another kind.
    """
    require("gguf", f"--gguf={kind}", "export a Hugging Face directory, without --gguf")
    import gguf

    config = read_config(directory)
    architecture = _check_architecture(config, directory)
    fields = _tokenizer_fields(directory, config.vocab_size)
    with new_file(file) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[kind])
        _add_architecture(writer, config)
        for field, add in (
            ("model", writer.add_tokenizer_model), ("pre", writer.add_tokenizer_pre), ("tokens", writer.add_token_list),
            ("types", writer.add_token_types), ("merges", writer.add_token_merges), ("bos", writer.add_bos_token_id),
            ("eos", writer.add_eos_token_id), ("eot", writer.add_eot_token_id), ("pad", writer.add_pad_token_id),
            ("add_bos", writer.add_add_bos_token), ("template", writer.add_chat_template),
        ):  # fmt: skip
            if fields.get(field) is not None:
                add(fields[field])
        _add_tensors(writer, config, directory, kind, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check_architecture(config: TransformerConfig, directory: Path) -> str:
    """llama.cpp's name of the architecture."""
    architecture, own = _ARCHITECTURES.get(config.family, ("", frozenset()))
    usual, free = TransformerConfig(8, 8, 1, 1, 1, 8, 8), {*_SIZES, *own, "family", "rope_scaling"}
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    other = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if config.rope_scaling is not None and not (
        architecture == "llama" and isinstance(config.rope_scaling, Llama3Scaling | LinearScaling)
    ):
        other.append(f"rope_scaling {config.rope_scaling.to_hugging_face()['rope_type']}")
    if architecture == "qwen3moe":  # llama.cpp divides the shares by their sum in this architecture
        other = [name for name in other if name != "shares_sum_to_one"]
        other += [] if config.shares_sum_to_one else ["norm_topk_prob=False"]
    if not architecture or other or is_reward_model(directory):
        what = ", ".join(other) or "a reward head"
        raise ConfigError(
            f"{directory} is a model of family {config.family!r} ({what}), which is not written as GGUF. Models of the "
            "Llama type are, and Qwen2, Qwen3, Qwen3-MoE and Phi-3 without window and scaled rotary embedding. "
            f"{_OTHERWISE}"
        )
    return architecture


def _add_architecture(writer: Any, config: TransformerConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim if config.rotary_dim is None else config.rotary_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.mlp_dim)


def _add_tensors(writer: Any, config: TransformerConfig, directory: Path, kind: str, architecture: str) -> None:
    import gguf
    from gguf import quants

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_layers)
    weights = open_weights(directory)
    for name, values in _joined(weights, expected_shapes(config)):
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            values = values[np.argsort(row_order(len(values), heads))]
        is_kept = values.ndim == 1 or name.endswith(".mlp.gate.weight")  # a router's name in Qwen3-MoE
        own = "f32" if is_kept else "f16" if kind == "q8_0" and values.shape[-1] % 32 else kind
        tensor_kind = gguf.GGMLQuantizationType[own.upper()]
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, quants.quantize(values, tensor_kind), raw_dtype=tensor_kind)
    if config.rope_scaling is not None:
        plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
        writer.add_tensor(ROPE_FACTORS, (plain / rotary_frequencies(config)).astype(np.float32))


def _joined(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a directory in float32; those of a layer's experts as one, under a name without a number."""

    def read(name: str) -> np.ndarray:
        return np.asarray(weights.read(name, (slice(None),) * len(shapes[name])), np.float32)

    experts: dict[str, list[str]] = {}
    for name in shapes:
        experts.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
    for joined, names in experts.items():
        yield joined, read(joined) if names == [joined] else np.stack([read(name) for name in names])


def _tokenizer_fields(directory: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer of a directory as GGUF's fields.

    Raises:
      ConfigError: it is no byte-level BPE, or splits words in a way that llama.cpp has no name for here.
    """
    import tokenizers

    file = directory / tokenizer_files.TOKENIZER
    if not file.is_file():
        raise ConfigError(f"{directory} has no tokenizer.json. A GGUF file holds its tokenizer. {_OTHERWISE}")
    definition = json.loads(file.read_text(encoding="utf-8"))
    model = definition["model"]
    pre = name_pre_tokenizer(definition) if model.get("type") == "BPE" else None
    if pre is None:
        raise ConfigError(
            f"the tokenizer of {directory} is {model.get('type')} with the pre-tokenizer "
            f"{json.dumps(definition.get('pre_tokenizer'))[:200]}. Byte-level BPE as in GPT-2, SmolLM2, Llama 3 and "
            f"Qwen2 is written. {_OTHERWISE}"
        )
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [_UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = tokenizer_files.read_special_tokens(directory)
    ids = {name: tokens.index(special[f"{name}_token"]) for name in ("bos", "eos", "pad") if f"{name}_token" in special}
    starts = tokenizers.Tokenizer.from_file(str(file)).encode("a").ids[:1]
    ends = _ends(directory)
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "types": types, "merges": merges, **ids,
        "eot": next((end for end in ends if end != ids.get("eos")), None),
        "add_bos": starts == [ids.get("bos")], "template": tokenizer_files.read_template(directory),
    }  # fmt: skip


def _ends(directory: Path) -> list[int]:
    """The ids that end a completion, from generation_config.json."""
    file = directory / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return found if isinstance(found, list) else [] if found is None else [found]
