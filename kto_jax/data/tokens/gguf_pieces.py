"""SentencePiece's kind of BPE in GGUF files (Gemma, Llama 2, Mixtral, Phi-3): pieces with scores instead of merges.

A tokenizer.json lists merges, most urgent first. llama.cpp merges the neighbours whose piece has the highest score, so
a piece's score is minus the rank of its first merge; in the other direction every split of a piece is a merge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens."""
_LONGEST = 256
"""Characters of a piece that is split. Gemma's longest is 31 spaces; the splits of a huge one would fill the memory."""
_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}


def describe_pieces(definition: Mapping[str, Any], size: int) -> dict[str, Any] | None:
    """A tokenizer.json as GGUF's fields: tokens, scores, types, and whether text begins with a space.

    Args:
      definition: the tokenizer.json.
      size: rows of the embedding; further tokens are unused.

    Returns:
      The fields, or None if the tokenizer is of another kind, or treats spaces in a way that llama.cpp cannot.
    """
    model, normalizer = definition["model"], definition.get("normalizer") or {}
    parts = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    if not model.get("byte_fallback") or parts not in ([_REPLACE], [_PREPEND, _REPLACE]):
        return None
    split = definition.get("pre_tokenizer") or {}
    if split and (split.get("type") != "Split" or split.get("pattern") != {"String": " "}):  # No space is left by then.
        return None
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    scores = [-float(len(merges))] * size
    for token, number in model["vocab"].items():
        tokens[number] = token
        types[number] = BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL
        scores[number] = -float(first.get(token, len(merges)))
    for added in definition["added_tokens"]:
        number = added["id"]
        tokens[number], types[number] = added["content"], CONTROL if added["special"] else USER_DEFINED
        if added["content"] == model.get("unk_token"):
            types[number] = UNKNOWN
    return {"tokens": tokens, "scores": scores, "types": types, "space_prefix": _PREPEND in parts}


def read_pieces(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that GGUF's fields describe, without special tokens.

    Args:
      fields: by their names without "tokenizer.".

    Raises:
      ValueError: a piece is too long.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores, types = fields["ggml.tokens"], fields["ggml.scores"], fields["ggml.token_type"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind == NORMAL:
            if len(token) > _LONGEST:
                raise ValueError(f"it has a piece of {len(token)} characters; at most {_LONGEST} are read")
            splits = ((token[:place], token[place:]) for place in range(1, len(token)))
            merges += [(-score, left, right) for left, right in splits if left in vocab and right in vocab]
    merges.sort(key=lambda merge: merge[0])
    unknown = fields.get("ggml.unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace, has_prefix = normalizers.Replace(" ", _SPACE), fields.get("ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace] if has_prefix else [replace])
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if has_prefix else parts)
    return backend
