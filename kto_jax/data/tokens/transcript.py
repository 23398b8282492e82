"""The turns of a conversation, read back from its token ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.data.tokens.tokenizer import TokenizerInfo, decode

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "model": "assistant", "tool": "tool",
}  # fmt: skip
"""What templates call the roles."""


def read_turns(tokenizer: TokenizerInfo, ids: Sequence[int] | np.ndarray) -> str | list[dict[str, str]]:
    """A prompt as messages, without control tokens and the open turn at its end; as text if no role can be found.

    Templates write a role between control tokens, or as the first line behind one: "<|im_start|>user\\nHello".

    Args:
      tokenizer: of the ids.
      ids: a rendered prompt.
    """
    turns: list[dict[str, str]] = []
    role = ""
    for part in _between_controls(tokenizer, ids):
        first, line_break, rest = part.partition("\n")
        if (found := _ROLES.get(first.strip().lower(), "")) and (line_break or first.strip() == part.strip()):
            role, part = found, rest
        if part.strip() and role:
            turns.append({"role": role, "content": part.strip()})
            role = ""
        elif part.strip():
            return decode(tokenizer, ids).strip()
    return turns if any(turn["role"] == "user" for turn in turns) else decode(tokenizer, ids).strip()


def _between_controls(tokenizer: TokenizerInfo, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text between control tokens."""
    controls = _controls(tokenizer.directory / "tokenizer.json")
    parts: list[list[int]] = [[]]
    for token in (int(one) for one in ids):
        if token in controls:
            parts.append([])
        else:
            parts[-1].append(token)
    return [decode(tokenizer, part) for part in parts if part]


@functools.lru_cache(maxsize=4)
def _controls(path: Path) -> frozenset[int]:
    import tokenizers

    backend: Any = tokenizers.Tokenizer.from_file(str(path))
    return frozenset(number for number, token in backend.get_added_tokens_decoder().items() if token.special)
