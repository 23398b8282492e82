"""Completions as TRL hands them to reward functions: text, or a list of one chat message if the prompt is a chat."""

from __future__ import annotations

from typing import Any


def as_completion(prompt: Any, text: str) -> str | list[dict[str, str]]:
    """The text, or one message of the assistant's if the prompt is chat messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(completion: str | list[Any]) -> str:
    """The text of a completion, or of the last of its messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
