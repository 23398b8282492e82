"""From a prompt to token ids: what the chat template writes when the model is served, closed by the generation prompt.

Runs in worker processes: it imports transformers.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import DataConfig
from kto_jax.data.rows.turns import REASONING, TOOL_CALLS, TOOLS, Message
from kto_jax.data.tokens import other_templates
from kto_jax.data.tokens.control_tokens import ControlTokens
from kto_jax.data.tokens.template import ANOTHER, ChatTemplate, EncodingError, Messages
from kto_jax.data.tokens.tokenizer_files import read_special_tokens, read_template

_SYSTEM = ("system", "developer")
_THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)
_NO_THINKING = {"enable_thinking": False}


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How conversations are rendered, apart from the chat template; the fields are those of `DataConfig`.

    Attributes:
      settings: variables for the template (`data.chat_template_kwargs`), as JSON.
      moment: what `strftime_now` shows, in ISO 8601; "" for a fixed one.
      fold_system: whether a system turn becomes the beginning of the user's turn.
      assistant_tokens: control tokens that keep their meaning in the assistant's text; None finds them.
    """

    settings: str = "{}"
    moment: str = ""
    fold_system: bool = False
    assistant_tokens: tuple[str, ...] | None = None


RENDERING_FIELDS = ("chat_template_kwargs", "template_date", "fold_system", "assistant_tokens")
"""Fields of `DataConfig` that make a `Rendering`."""


def rendering_of(data: DataConfig) -> Rendering:
    """How a configuration renders conversations; a date of "auto" is today."""
    date = datetime.date.today().isoformat() if data.template_date == "auto" else data.template_date
    return Rendering(
        settings=json.dumps(dict(data.chat_template_kwargs), sort_keys=True),
        moment=f"{date}T12:00:00",
        fold_system=data.fold_system,
        assistant_tokens=None if data.assistant_tokens == "auto" else tuple(data.assistant_tokens),
    )


class PromptEncoder:
    """Encodes prompts with one tokenizer.

    Args:
      directory: tokenizer directory written by `prepare_tokenizer`.
      bos_id: the model's BOS, or None.
      has_chat_template: whether prompts are rendered by the tokenizer's chat template.
      end_ids: ids that end a completion.
      rendering: how the template is used.

    Attributes:
      controls: the control tokens of the tokenizer.
      ends: the text of the tokens that end a completion.
      template: the chat template in use, or None.

    Raises:
      EncodingError: `assistant_tokens` names a token that is not a control token.
    """

    def __init__(
        self, directory: Path, bos_id: int | None, has_chat_template: bool, end_ids: set[int], rendering: Rendering
    ):
        self.controls = ControlTokens(directory)
        first = self.controls.first_ids(1)
        self._added_bos = first if first == [bos_id] else []
        self.ends = tuple(name for name, i in self.controls.ids.items() if i in end_ids)
        source, special_tokens = read_template(directory), read_special_tokens(directory)
        # If no template is used, the tokenizer's own still detects prompts that it has already rendered.
        self._own = None if source is None else ChatTemplate(source, special_tokens)
        self.template: ChatTemplate | None = None
        if has_chat_template:
            assert source is not None, f"{directory} has no chat template"
            moment = datetime.datetime.fromisoformat(rendering.moment) if rendering.moment else None
            self.template = ChatTemplate(source, special_tokens, json.loads(rendering.settings), moment)
        self._fold_system = rendering.fold_system
        self.controls.emitted = self._find_emitted(rendering.assistant_tokens)
        self._render = functools.lru_cache(maxsize=4096)(self._render_uncached)

    def encode(self, prompt: str | list[Message]) -> np.ndarray:
        """Encodes a prompt, closed by the generation prompt, with exactly one BOS if the tokenizer adds one.

        Args:
          prompt: text (one user turn if there is a chat template) or messages.

        Returns:
          Ids, int32.

        Raises:
          EncodingError: there are messages but no template, or the template refuses them.
        """
        mark = unused_character(contents_of(prompt))
        if self.template is not None:
            text = self.render(prompt, mark, self.thinking([]))
        elif isinstance(prompt, str):
            text = prompt if self.is_rendered(prompt) else self.controls.mask(prompt, mark)
        else:
            raise EncodingError("chat messages need a chat template; data.chat_template names a file")
        return np.asarray(self.ids(text, mark), np.int32)

    def render(self, prompt: str | list[Message], mark: str, settings: Mapping[str, Any]) -> str:
        """The masked text of a prompt, closed by the generation prompt."""
        return self._render(json.dumps(prompt), mark, json.dumps(settings))

    def _render_uncached(self, prompt_json: str, mark: str, settings_json: str) -> str:
        assert self.template is not None
        prompt = json.loads(prompt_json)
        if self.is_rendered(prompt):
            raise EncodingError(
                'the prompt is rendered by a chat template already: data.chat_template="none" reads its control tokens'
            )
        if isinstance(prompt, str) and (beginning := other_templates.renders(prompt)):
            raise EncodingError(
                f"the prompt is rendered by another model's chat template, which begins {beginning!r}: give its "
                'messages, or data.chat_template="none" reads all of it as text'
            )
        messages = self.messages(prompt, mark)
        return self.template.render(messages, add_generation_prompt=True, **json.loads(settings_json))

    def ids(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered prompt, with exactly one BOS if the tokenizer adds one."""
        ids = self.controls.encode(text, mark)
        return ids if ids[:1] == self._added_bos else self._added_bos + ids

    def canonical(self, prompt: str | list[Message], mark: str, opened: str, ids: np.ndarray) -> np.ndarray:
        """Ids of a prompt on a fixed day and without settings: see `EncodedRecord`."""
        assert self.template is not None and self._own is not None
        text = opened
        if self.template.is_dated or self.template.settings or self.template.can_think:
            text = self._own.render(self.messages(prompt, mark), add_generation_prompt=True, **_NO_THINKING)
        return ids if text == opened else np.asarray(self.ids(text, mark), np.int32)

    def is_rendered(self, prompt: str | list[Message]) -> bool:
        """Whether a text begins as a rendered conversation does, and ends in its generation prompt."""
        if not isinstance(prompt, str) or not self.controls.pattern.match(prompt.lstrip()):
            return False
        text = prompt.rstrip()
        if self._own is None:
            return len(self.controls.pattern.findall(text)) > 1
        return any(text.endswith(end.rstrip()) for end in self._own.prompt_ends if end.strip())

    def messages(self, prompt: str | list[Message], mark: str) -> Messages:
        """The turns of a prompt as the template gets them.

        Raises:
          EncodingError: the template does not take or show a part of them.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        system = next((i for i, message in enumerate(messages) if message["role"] in _SYSTEM), None)
        if system is not None and self._fold_system:
            messages = _folded(messages, system)
        elif system is not None and self.template is not None and not self.template.takes_system:
            raise EncodingError(
                "the chat template does not take a system turn: data.fold_system=True puts it into the user's turn"
            )
        if any(REASONING in message for message in messages) and not self._shows_thoughts:
            raise EncodingError(f"the chat template does not show the field {REASONING!r} of the prompt{ANOTHER}")
        return [self.masked(message, mark) for message in messages]

    def masked(self, message: Message, mark: str) -> dict[str, Any]:
        """A message as the template gets it: control strings masked, and its calls as objects."""
        masked: dict[str, Any] = {}
        keep = self.controls.emitted if message["role"] == "assistant" else frozenset[str]()
        for key, value in message.items():
            try:
                if key == TOOL_CALLS:
                    masked[key] = self.controls.mask_json(json.loads(value), mark)
                elif message["role"] == TOOLS and key == "content":
                    masked[key] = json.dumps(self.controls.mask_json(json.loads(value), mark))
                else:
                    masked[key] = self.controls.mask(value, mark, keep if key == "content" else frozenset())
            except RecursionError:
                raise EncodingError("tools are nested too deeply") from None
        return masked

    def opened_thought(self, opened: str) -> tuple[str, str] | None:
        """The tokens that begin and end a thought, if a prompt ends inside a thought that it opens."""
        tail = opened.rstrip()
        for begin in self.controls.emitted:
            end = begin.replace("<", "</", 1).replace("[", "[/", 1)
            if end in self.controls.emitted and end != begin and tail.endswith(begin):
                return begin, end
        return None

    @functools.cached_property
    def _shows_thoughts(self) -> bool:
        """Whether the template writes thoughts from a field of their own, or opens a thought at the end of prompts."""
        assert self.template is not None
        opens = any(self.opened_thought(end) is not None for end in self.template.prompt_ends)
        return opens or self.template.shows_reasoning

    def thinking(self, replies: Sequence[Message]) -> dict[str, Any]:
        """Whether the prompt invites a thought: by the settings, else if a completion holds one."""
        assert self.template is not None
        if "enable_thinking" in self.template.settings:
            return {}
        return {"enable_thinking": any(map(self._has_thought, replies))} if self.template.can_think else _NO_THINKING

    def _has_thought(self, reply: Message) -> bool:
        names = self.controls.pattern.findall(reply["content"])
        return REASONING in reply or any(name in self.controls.emitted and _THOUGHT.search(name) for name in names)

    def _find_emitted(self, given: tuple[str, ...] | None) -> frozenset[str]:
        if given is None:
            return self.controls.find_emitted(self._own, self.ends)
        if unknown := [name for name in given if name not in self.controls.ids]:
            raise EncodingError(f"data.assistant_tokens names {unknown[0]!r}, which is no control token")
        return frozenset(given)


def _folded(messages: list[Message], system: int) -> list[Message]:
    """The messages, with the system turn at the beginning of the next user's turn."""
    user = next((i for i in range(system + 1, len(messages)) if messages[i]["role"] == "user"), None)
    if user is None:
        raise EncodingError("a system turn has no user's turn behind it to be put into")
    content = f"{messages[system]['content'].strip()}\n\n{messages[user]['content']}"
    folded = {**messages[user], "content": content}
    return [folded if i == user else message for i, message in enumerate(messages) if i != system]


def contents_of(prompt: str | Sequence[Message]) -> list[str]:
    """All texts of a prompt."""
    return [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]


def unused_character(texts: list[str]) -> str:
    """A private-use character that is in none of the texts."""
    for code in range(0xE000, 0xF900):
        if not any(chr(code) in text for text in texts):
            return chr(code)
    raise EncodingError("text holds every private-use character")
