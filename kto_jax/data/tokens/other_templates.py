"""Control strings of other models in a record: text that was written for another chat template.

To this model they are letters. A prompt that another template has rendered, or an end token that another trainer
needed, would be trained on as text in silence.
"""

from __future__ import annotations

import re

_BEGINNING = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>)?\s*"
    r"(?:<\|im_start\|>|<\|start_header_id\|>|\[INST\]|\[SYSTEM_PROMPT\]|<start_of_turn>|<\|start\|>|"
    r"<\|(?:user|system|User|Human)\|>|<｜User｜>)"
)
_END = re.compile(
    r"(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|\[/INST\]|<start_of_turn>model|"
    r"<\|start\|>assistant|<\|(?:assistant|Assistant)\|>|<｜Assistant｜>)\s*(?:<think>)?\s*\Z"
)
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<|return|>", "<end_of_turn>"),
    *("<eos>", "</s>", "<｜end▁of▁sentence｜>"),
)
"""Tokens with which well-known models end a turn."""


def renders(prompt: str) -> str | None:
    """How a prompt begins, if it begins and ends as the rendered conversations of a well-known model do."""
    found = _BEGINNING.match(prompt)
    return found[0].strip() if found and _END.search(prompt) else None


def end_of(text: str) -> str | None:
    """The end token of a well-known model with which a text ends, or None."""
    return next((end for end in ENDS if text.rstrip().endswith(end)), None)
