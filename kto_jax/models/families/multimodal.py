"""Models that also read images: their language model is read, the rest is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# The name of a tensor of the language model, by the prefix that it has here; older files first.
_PREFIXES = {"language_model.model.": "model.", "language_model.": "", "model.language_model.": "model."}


@dataclasses.dataclass(frozen=True)
class Multimodal:
    """A model with a language model inside.

    Attributes:
      name: its `model_type` in a config.json.
      architecture: transformers' class for it.
      text: the family of its language model.
      defaults: transformers' defaults for entries that its text_config lacks.
    """

    name: str
    architecture: str
    text: str
    defaults: Mapping[str, Any]


MULTIMODAL = (
    Multimodal(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        {
            "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
    ),
    Multimodal(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "mistral",
        {
            "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None,
        },
    ),
)  # fmt: skip


def find_multimodal(values: Mapping[str, Any]) -> Multimodal | None:
    """The model that a config.json is of, by its `architectures`, or by its `model_type` if it has none."""
    named = (values.get("architectures") or [None])[0]
    return next(
        (
            model for model in MULTIMODAL
            if named == model.architecture or (named is None and values.get("model_type") == model.name)
        ),
        None,
    )  # fmt: skip


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the language model alone; that of a language model as it is."""
    model = find_multimodal(values)
    if model is None:
        return values
    own = dict(values.get("text_config") or {})
    # These stand outside in published files.
    outer = {name: values[name] for name in ("tie_word_embeddings", "eos_token_id", "bos_token_id") if name in values}
    return {**model.defaults, **own, **outer, "architectures": None, "model_type": model.text}


def text_name(name: str) -> str | None:
    """The name that a tensor has in a file of the language model alone; None if it is of another part."""
    if name.startswith(_OTHER_PARTS):
        return None
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else _PREFIXES[prefix] + name.removeprefix(prefix)
