"""Exports a reward model for transformers as its family's sequence classifier with one label.

transformers scores a sequence at the last token that is not `pad_token_id`; our score is read at the EOS that ends
every completion. Padding must therefore not be an EOS: with the same token for both, as in many tokenizers,
transformers would read the token before the EOS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.weights.safetensors_files import read_json

_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")


def classifier_values(config: TransformerConfig, pad_id: int) -> dict[str, Any]:
    """The contents of a reward model's config.json."""
    return write_config_json(config) | {
        "architectures": [FAMILIES[config.family].classifier],
        "num_labels": 1,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad_id,
    }


def choose_padding(
    config: TransformerConfig, tokenizer_dir: str | Path | None, stop_ids: Sequence[int] = ()
) -> tuple[int, str | None]:
    """The token that pads batches of a reward model.

    Args:
      config: the architecture.
      tokenizer_dir: the exported tokenizer, or None.
      stop_ids: ids that end a completion, besides the EOS of both.

    Returns:
      The id and text of the first of these that is not an EOS: the tokenizer's padding, unknown or BOS token, or
      another of its special tokens. If there is none, the model's BOS or the smallest id, and None: any token that ends
      no sequence can pad, but a word must not become a special token.
    """
    directory = Path(tokenizer_dir or "")
    taken = {*config.eos_ids, *stop_ids}
    if tokenizer_dir is not None and (directory / "tokenizer.json").is_file():
        settings = _settings(directory)
        added = read_json(directory / "tokenizer.json").get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        taken.add(special.get(_content(settings.get("eos_token")), -1))
        named = [_content(settings.get(f"{name}_token")) for name in ("pad", "unk", "bos")]
        for content in (*named, *special):
            token_id = special.get(content)
            if token_id is not None and token_id not in taken and token_id < config.vocab_size:
                return token_id, content
    bos = () if config.bos_id is None else (config.bos_id,)
    return next(token_id for token_id in (*bos, *range(len(taken) + 1)) if token_id not in taken), None


def write_padding(directory: Path, content: str | None) -> None:
    """Sets a tokenizer's padding token; with None it removes it, so that the tokenizer refuses to pad."""
    for name in _SETTINGS:
        file = directory / name
        if file.is_file():
            settings = read_json(file)
            settings.pop("pad_token", None)
            settings |= {} if content is None else {"pad_token": content}
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings(directory: Path) -> dict[str, Any]:
    """The special tokens by name; the newer file takes precedence."""
    files = [directory / name for name in _SETTINGS]
    return {name: value for file in files if file.is_file() for name, value in read_json(file).items()}


def _content(token: Any) -> str:
    """The text of a special token, which is stored as a string or an object."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)
