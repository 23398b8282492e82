"""Control tokens: their strings, and in which text a string may become its token.

A string such as `<|im_end|>` in a user's text must never become the control token that ends a turn. So every control
string in such text is masked before the chat template is rendered, and encoded separately from the markup:

    content            say <|im_end|> please
    masked             say ▮3▮ please                     ▮ is a character that occurs in no text of the record
    rendered           <|im_start|>user\\nsay ▮3▮ please<|im_end|>\\n
    encoded            "<|im_start|>user\\nsay " with control tokens, "<|im_end|>" without, " please<|im_end|>\\n" with

In the assistant's own text, the control tokens that an assistant emits keep their meaning: `<think>`, `</think>`, the
markers of tool calls. The others are masked there too.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kto_jax.data.tokens.template import ChatTemplate, EncodingError

_EMITTED = re.compile(
    r"think|thought|reason|reflect|scratch_?pad|solution|answer|tool[_▁ ]?(?:call|sep)|function|TOOL_CALLS|python_tag",
    re.IGNORECASE,
)
_MARKS_BEGINNINGS = re.compile(r'"type": "Prepend"|"prepend_scheme": "(?:always|first)"|"add_prefix_space": true')
_RECEIVED = re.compile(r"response|result|output|available", re.IGNORECASE)


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
      directory: holds tokenizer.json.

    Attributes:
      ids: of each control token, by its text.
      emitted: texts of those that an assistant writes; see `find_emitted`.
    """

    def __init__(self, directory: Path):
        import tokenizers

        definition = json.loads((directory / "tokenizer.json").read_bytes())
        definition["truncation"] = definition["padding"] = None
        added = definition["added_tokens"]
        self._full = tokenizers.Tokenizer.from_str(json.dumps(definition))
        # SentencePiece begins a text with a space marker that the same text lacks after other text.
        self._marks_beginnings = bool(_MARKS_BEGINNINGS.search(json.dumps(definition)))
        # Added tokens that are only white space are ordinary text; all others are control tokens.
        self.ids: dict[str, int] = {t["content"]: t["id"] for t in added if t["special"] or t["content"].strip()}
        self._id_set = frozenset(self.ids.values())
        definition["added_tokens"] = [t for t in added if t["content"] not in self.ids]
        definition["post_processor"] = None
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self._names = sorted(self.ids, key=len, reverse=True)
        # Longest first. Without control tokens the pattern matches nothing.
        self.pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self.emitted: frozenset[str] = frozenset()

    def find_emitted(self, template: ChatTemplate | None, ends: Iterable[str]) -> frozenset[str]:
        """The control tokens that an assistant emits.

        They are those whose names say so (thoughts, calls of tools), and those that the template writes for a call of
        a tool but not for a plain answer or a tool's result. What ends a turn is none of them.

        Args:
          template: the chat template, or None.
          ends: tokens that end a completion.
        """
        named = {name for name in self.ids if _EMITTED.search(name) and not _RECEIVED.search(name)}
        if template is not None:
            written = {kind: set(self.pattern.findall(text)) for kind, text in template.probes.items()}
            named |= written["call"] - written["answer"] - written["result"]
            named -= written["result"] - written["call"] - written["answer"]
        return frozenset(named - set(ends))

    def mask(self, text: str, mark: str, keep: frozenset[str] = frozenset()) -> str:
        """The text with every control string, except those to keep, replaced by `mark`, its number, `mark`."""

        def masked(match: re.Match[str]) -> str:
            return match[0] if match[0] in keep else f"{mark}{self._names.index(match[0])}{mark}"

        return self.pattern.sub(masked, text)

    def mask_json(self, value: Any, mark: str) -> Any:
        """Masks every text in a JSON value."""
        if isinstance(value, str):
            return self.mask(value, mark)
        if isinstance(value, list):
            return [self.mask_json(item, mark) for item in value]
        if isinstance(value, dict):
            return {self.mask(key, mark): self.mask_json(item, mark) for key, item in value.items()}
        return value

    def unmask(self, text: str, mark: str) -> str:
        """The text before it was masked."""
        return re.sub(f"{mark}([0-9]+){mark}", lambda match: self._names[int(match[1])], text)

    def encode(self, text: str, mark: str, before: str = "") -> list[int]:
        """Ids of a masked text: control strings become control tokens, masked ones become ordinary tokens.

        Args:
          text: the text.
          mark: the character that it is masked with.
          before: masked text that it continues.

        Raises:
          EncodingError: other text would become a control token.
        """
        sections = re.split(f"{mark}([0-9]+){mark}", text)
        ids = self._encode_section(sections[0], self._open_text(before, mark))
        for number, section in zip(sections[1::2], sections[2::2], strict=True):
            ids += self._plain.encode(self._names[int(number)], add_special_tokens=False).ids
            ids += self._encode_section(section)
        return ids

    def _encode_section(self, section: str, before: str = "") -> list[int]:
        ids = self._full.encode(section, add_special_tokens=False).ids
        # A normaliser could turn other text into a control string.
        if sum(token in self._id_set for token in ids) != len(self.pattern.findall(section)):
            raise EncodingError("text turns into a control token")
        if before and section:
            context = self._full.encode(before, add_special_tokens=False).ids
            both = self._full.encode(before + section, add_special_tokens=False).ids
            if both[: len(context)] == context:
                return both[len(context) :]
        return ids

    def _open_text(self, before: str, mark: str) -> str:
        """The text after the last control string, if it affects the encoding of the text that follows."""
        if not self._marks_beginnings:
            return ""
        return self.pattern.split(re.split(f"{mark}[0-9]+{mark}", before)[-1])[-1]

    def count(self, text: str) -> collections.Counter[str]:
        """How often each emitted control token occurs in a text."""
        return collections.Counter(name for name in self.pattern.findall(text) if name in self.emitted)

    def first_ids(self, num: int) -> list[int]:
        """The first ids of an ordinary text as the tokenizer encodes it alone: BOS, if it adds one."""
        return self._full.encode("a").ids[:num]

    def token(self, token_id: int) -> str:
        """The text of a token, for messages."""
        return str(self._full.id_to_token(token_id))
