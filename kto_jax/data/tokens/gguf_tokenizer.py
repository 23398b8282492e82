"""The tokenizer that a GGUF file carries, rebuilt without transformers (whose GGUF reader needs torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_jax.config import ConfigError
from kto_jax.data.tokens.gguf_pieces import CONTROL, UNKNOWN, USER_DEFINED, read_pieces
from kto_jax.storage.gguf_files import open_gguf_file

if TYPE_CHECKING:
    import tokenizers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_PRE_TOKENIZERS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "olmo": None,
    "smollm": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""How each kind of file splits text into words: as GPT-2, as GPT-2 with single digits, or by a regular expression."""
_COMPOSED = ("olmo", "qwen2", "deepseek-r1-qwen")
"""The kinds whose tokenizers compose characters (NFC) first, which llama.cpp does not."""


@dataclasses.dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer in a GGUF file.

    Attributes:
      backend: the tokenizer; it adds a leading BOS if the file says so.
      special_tokens: `bos_token`, `eos_token`, `pad_token`, `unk_token`, as far as the file names them.
      chat_template: Jinja text, or None.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None


def read_gguf_tokenizer(path: Path) -> GGUFTokenizer:
    """Rebuilds the tokenizer of a GGUF file: byte-level BPE, or pieces with scores.

    Args:
      path: the file.

    Returns:
      The tokenizer, its special tokens and its chat template.

    Raises:
      ConfigError: the file is not GGUF, or its kind of tokenizer is not supported.
    """
    reader = open_gguf_file(path)
    try:
        return _read_tokenizer(path, reader)
    except ConfigError:
        raise
    except Exception as error:  # Values of any type may be in any field, and tokenizers raises Exception itself.
        raise ConfigError(
            f"{path} has no usable tokenizer ({type(error).__name__}: {error}). Byte-level BPE is needed. Download the "
            "file again, or use the Hugging Face directory of the same model."
        ) from error


def _read_tokenizer(path: Path, reader: Any) -> GGUFTokenizer:
    from tokenizers import normalizers

    fields = {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
    }
    kind, split = fields.get("ggml.model"), fields.get("ggml.pre", "default")
    has_pieces = kind == "llama" and "ggml.scores" in fields
    if not has_pieces and (kind != "gpt2" or split not in _PRE_TOKENIZERS):
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r}, {split!r}. Of GGUF files, pieces with scores (llama) are read, "
            f"and byte-level BPE (gpt2) split as {', '.join(_PRE_TOKENIZERS)}. Use the Hugging Face directory of the "
            "same model."
        )
    tokens = fields["ggml.tokens"]
    special_tokens = {
        f"{short}_token": tokens[fields[f"ggml.{name}_token_id"]]
        for short, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"ggml.{name}_token_id" in fields
    }
    backend = read_pieces(fields) if has_pieces else _byte_level_bpe(fields, _PRE_TOKENIZERS[split])
    if not has_pieces and split in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    _add_tokens(backend, fields)
    if fields.get("ggml.add_bos_token", has_pieces) and "bos_token" in special_tokens:
        _add_bos(backend, special_tokens["bos_token"])
    return GGUFTokenizer(backend, special_tokens, fields.get("chat_template"))


def name_pre_tokenizer(definition: Mapping[str, Any]) -> str | None:
    """The name that GGUF files give to the way in which a tokenizer.json splits text; None if it is not known here.

    Args:
      definition: the tokenizer.json.
    """
    parts = definition.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", []) if parts.get("type") == "Sequence" else [parts]
    *before, last = parts or [{}]
    composes = definition.get("normalizer") == {"type": "NFC"}
    is_plain = composes or not definition.get("normalizer")
    is_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if not is_bytes or not is_plain or len(before) > 1:
        return None
    if not before:
        return ("olmo" if composes else "gpt-2") if last.get("use_regex", True) else None
    if before[0].get("type") == "Digits" and before[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    regex = before[0].get("pattern", {}).get("Regex", "") if before[0].get("behavior") == "Isolated" else ""
    return {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}.get(regex) if not last.get("use_regex", True) else None


def _byte_level_bpe(fields: dict[str, Any], split: str | None) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split is None:
        backend.pre_tokenizer = gpt2
    elif split == "digits":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    else:
        by_regex = pre_tokenizers.Split(Regex(split), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([by_regex, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    pairs = list(zip(fields["ggml.tokens"], fields.get("ggml.token_type", []), strict=False))
    special = [AddedToken(token, normalized=False, special=True) for token, k in pairs if k in (CONTROL, UNKNOWN)]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(token, normalized=False) for token, k in pairs if k == USER_DEFINED])


def _add_bos(backend: tokenizers.Tokenizer, bos_token: str) -> None:
    from tokenizers import processors

    bos_id = backend.token_to_id(bos_token)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", pair=f"{bos_token} $A $B", special_tokens=[(bos_token, bos_id)]
    )
