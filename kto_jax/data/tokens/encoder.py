"""From a prompt and its completions to token ids. Runs in worker processes: it imports transformers.

The prompt is what the chat template writes when the model is served: the conversation, closed by the generation prompt.
The completion is what the model would then be seen to write, closed by one end token. Two rules give it:

    template     the rendered conversation begins with the prompt: the completion is what the template writes behind it
    served       it does not (the template drops thoughts, or the prompt opens one): the completion is the record's own
                 text, continued from where the prompt ends

`control_tokens` says which control strings keep their meaning in whose text.
"""

from __future__ import annotations

import collections
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
from kto_jax.data.rows.turns import REASONING, TOOL_CALLS, TOOLS, Completion, Message
from kto_jax.data.tokens.control_tokens import ControlTokens
from kto_jax.data.tokens.template import ChatTemplate, EncodingError, Messages
from kto_jax.data.tokens.tokenizer_files import read_special_tokens, read_template

__all__ = ["EncodedRecord", "Encoder", "EncodingError", "Rendering"]

_SYSTEM = ("system", "developer")
_THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)
_NO_THINKING = {"enable_thinking": False}


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How conversations are rendered, beside the chat template itself; the fields are those of `DataConfig`.

    Attributes:
      settings: variables for the template (`data.chat_template_kwargs`), as JSON.
      moment: what `strftime_now` shows, in ISO 8601; "" for a fixed one.
      fold_system: whether a system turn becomes the beginning of the user's.
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


@dataclasses.dataclass(frozen=True)
class EncodedRecord:
    """A prompt and its completions.

    Attributes:
      prompt: ids, closed by the generation prompt, int32.
      canonical: the prompt's ids on a fixed day and without settings, int32. They tell prompts apart in the same way
        whenever and however the record is rendered.
      completions: ids of each, closed by one end token, int32.
      counts: what was done to how many completions, by kind and name; see `Encoder.encode`.
    """

    prompt: np.ndarray
    canonical: np.ndarray
    completions: list[np.ndarray]
    counts: collections.Counter[tuple[str, str]]


class Encoder:
    """Encodes records with one tokenizer.

    Args:
      directory: tokenizer directory written by `prepare_tokenizer`.
      bos_id: the model's BOS, or None.
      eos_id: what every completion ends in.
      has_chat_template: whether prompts are rendered by the tokenizer's chat template.
      stop_ids: ids that end a completion; their text is taken off a completion that ends in it already.
      rendering: how the template is used.

    Raises:
      EncodingError: `assistant_tokens` names what is no control token.
    """

    def __init__(
        self,
        directory: Path,
        bos_id: int | None,
        eos_id: int,
        has_chat_template: bool,
        *,
        stop_ids: Sequence[int] = (),
        rendering: Rendering | None = None,
    ):
        rendering = rendering or Rendering()
        self.directory = directory
        self._controls = ControlTokens(directory)
        self._eos_id = eos_id
        self.bos_id = bos_id
        first = self._controls.first_ids(1)
        self._added_bos = first if first == [bos_id] else []
        self._ends = tuple(name for name, i in self._controls.ids.items() if i in {eos_id, *stop_ids})
        source, special_tokens = read_template(directory), read_special_tokens(directory)
        # Without a template in use, the tokenizer's own still tells which prompts it has rendered already.
        own = None if source is None else ChatTemplate(source, special_tokens)
        self._template: ChatTemplate | None = None
        if has_chat_template:
            assert source is not None, f"{directory} has no chat template"
            moment = datetime.datetime.fromisoformat(rendering.moment) if rendering.moment else None
            self._template = ChatTemplate(source, special_tokens, json.loads(rendering.settings), moment)
        self._own, self._fold_system = own, rendering.fold_system
        self._controls.emitted = self._find_emitted(rendering.assistant_tokens, own)
        self._render_prompt = functools.lru_cache(maxsize=4096)(self._render_prompt_uncached)

    # ------------------------------------------------------------------------------------------------ what is asked

    def encode(self, prompt: str | list[Message], completions: Sequence[Completion]) -> EncodedRecord:
        """Encodes a prompt and what is said in reply to it.

        Args:
          prompt: text (one user turn where there is a chat template) or messages.
          completions: texts, or messages that call tools or hold a thought.

        Returns:
          Ids and counts. The counts are, by kind: "rule" ("template", "served", "plain", or "rendered" where the prompt
          was rendered already), "end" (end tokens taken off, by token), "thought" ("empty": empty thoughts closed) and
          "token" (control tokens kept in completions, by token).

        Raises:
          EncodingError: the template refuses the record, or leaves out a part of it.
        """
        replies = [_reply(completion) for completion in completions]
        mark = _unused_character([*_contents(prompt), *(text for reply in replies for text in _contents([reply]))])
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        replies = [self._without_end(reply, counts) for reply in replies]
        if self._template is None:
            texts = [self._plain_completion(reply, mark) for reply in replies]
            counts["rule", "rendered" if self._is_rendered(prompt) else "plain"] += len(texts)
            prompt_ids = canonical = self.encode_prompt(prompt)
            before = self._controls.mask(prompt, mark) if isinstance(prompt, str) else ""
        else:
            settings = self._thinking(replies)
            opened = before = self._prompt_text(prompt, mark, settings)
            texts = [self._completion(prompt, reply, mark, opened, settings, counts) for reply in replies]
            prompt_ids = np.asarray(self._prompt_ids(opened, mark), np.int32)
            canonical = self._canonical(prompt, mark, opened, prompt_ids)
        encoded = []
        for text in texts:
            encoded.append(np.asarray([*self._controls.encode(text, mark, before), self._eos_id], np.int32))
            counts.update({("token", name): n for name, n in self._controls.count(text).items()})
        return EncodedRecord(prompt_ids, canonical, encoded, counts)

    def encode_row(self, prompt: str | list[Message], completion: Completion) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a prompt and of one completion, as `encode` gives them."""
        record = self.encode(prompt, [completion])
        return record.prompt, record.completions[0]

    def encode_prompt(self, prompt: str | list[Message]) -> np.ndarray:
        """Encodes a prompt, closed by the generation prompt, with exactly one BOS where the tokenizer adds one.

        Args:
          prompt: text (one user turn where there is a chat template) or messages.

        Returns:
          Ids, int32.

        Raises:
          EncodingError: there are messages but no template, or the template refuses them.
        """
        mark = _unused_character(_contents(prompt))
        if self._template is not None:
            text = self._prompt_text(prompt, mark, self._thinking([]))
        elif isinstance(prompt, str):
            text = prompt if self._is_rendered(prompt) else self._controls.mask(prompt, mark)
        else:
            raise EncodingError("chat messages need a chat template")
        return np.asarray(self._prompt_ids(text, mark), np.int32)

    def find_turn_end(self) -> int | None:
        """The control token that the chat template writes behind a completion, white space aside.

            Fine.<|im_end|>\\n          <|im_end|>
            Fine. </s>                 </s>
            Fine.\\n### End\\n          None

        Returns:
          Its id, the first where there are several; None where text comes first, or nothing.

        Raises:
          EncodingError: the template refuses a conversation or changes it.
        """
        assert self._template is not None
        found = self._controls.pattern.match(self._template.turn_end.lstrip())
        return self._controls.ids[found[0]] if found else None

    @property
    def is_dated(self) -> bool:
        """Whether prompts depend on the moment at which they are rendered."""
        return self._template is not None and self._template.is_dated

    @property
    def emitted(self) -> frozenset[str]:
        """The control tokens that keep their meaning in the assistant's text."""
        return self._controls.emitted

    def token(self, token_id: int) -> str:
        """The text of a token, for messages."""
        return self._controls.token(token_id)

    # ------------------------------------------------------------------------------------------------ prompts

    def _prompt_text(self, prompt: str | list[Message], mark: str, settings: Mapping[str, Any]) -> str:
        return self._render_prompt(json.dumps(prompt), mark, json.dumps(settings))

    def _render_prompt_uncached(self, prompt_json: str, mark: str, settings_json: str) -> str:
        assert self._template is not None
        prompt = json.loads(prompt_json)
        if self._is_rendered(prompt):
            raise EncodingError(
                'the prompt is rendered by a chat template already: data.chat_template="none" reads its control tokens'
            )
        messages = self._messages(prompt, mark)
        return self._template.render(messages, add_generation_prompt=True, **json.loads(settings_json))

    def _prompt_ids(self, text: str, mark: str) -> list[int]:
        ids = self._controls.encode(text, mark)
        return ids if ids[:1] == self._added_bos else self._added_bos + ids

    def _canonical(self, prompt: str | list[Message], mark: str, opened: str, ids: np.ndarray) -> np.ndarray:
        assert self._template is not None and self._own is not None
        text = opened
        if self._template.is_dated or self._template.settings or self._template.can_think:
            text = self._own.render(self._messages(prompt, mark), add_generation_prompt=True, **_NO_THINKING)
        return ids if text == opened else np.asarray(self._prompt_ids(text, mark), np.int32)

    def _is_rendered(self, prompt: str | list[Message]) -> bool:
        """Whether a text begins as a rendered conversation does, and ends in its generation prompt."""
        if not isinstance(prompt, str) or not self._controls.pattern.match(prompt.lstrip()):
            return False
        text = prompt.rstrip()
        if self._own is None:
            return len(self._controls.pattern.findall(text)) > 1
        return any(text.endswith(end.rstrip()) for end in self._own.prompt_ends if end.strip())

    def _messages(self, prompt: str | list[Message], mark: str) -> Messages:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        system = next((i for i, message in enumerate(messages) if message["role"] in _SYSTEM), None)
        if system is not None and self._fold_system:
            messages = _folded(messages, system)
        elif system is not None and self._template is not None and not self._template.takes_system:
            raise EncodingError(
                "the chat template does not take a system turn: data.fold_system=True puts it into the user's turn"
            )
        if any(REASONING in message for message in messages) and not self._shows_thoughts:
            raise EncodingError(f"the chat template does not show the field {REASONING!r} of the prompt")
        return [self._masked(message, mark) for message in messages]

    def _masked(self, message: Message, mark: str) -> dict[str, Any]:
        """A message as the template gets it: control strings masked, and its calls as objects."""
        masked: dict[str, Any] = {}
        keep = self._controls.emitted if message["role"] == "assistant" else frozenset[str]()
        for key, value in message.items():
            try:
                if key == TOOL_CALLS:
                    masked[key] = self._controls.mask_json(json.loads(value), mark)
                elif message["role"] == TOOLS and key == "content":
                    masked[key] = json.dumps(self._controls.mask_json(json.loads(value), mark))
                else:
                    masked[key] = self._controls.mask(value, mark, keep if key == "content" else frozenset())
            except RecursionError:
                raise EncodingError("tools are nested too deeply") from None
        return masked

    # ------------------------------------------------------------------------------------------------ completions

    def _completion(
        self,
        prompt: str | list[Message],
        reply: Message,
        mark: str,
        opened: str,
        settings: Mapping[str, Any],
        counts: collections.Counter[tuple[str, str]],
    ) -> str:
        """The masked text of a completion behind the rendered prompt `opened`."""
        template = self._template
        assert template is not None
        masked = self._masked(reply, mark)
        if REASONING in reply and not template.shows_reasoning and not self._opened_thought(opened):
            raise EncodingError(f"the chat template does not show the field {REASONING!r} of the completion")
        whole = template.render([*self._messages(prompt, mark), masked], add_generation_prompt=False, **settings)
        if whole.startswith(opened):
            written = self._written(whole[len(opened) :], masked)
            if written is not None:
                counts["rule", "template"] += 1
                return written
        elif TOOL_CALLS in reply:
            raise EncodingError("the chat template changes the prompt when calls of tools are added")
        counts["rule", "served"] += 1
        return self._served(opened, masked, counts)

    def _written(self, text: str, reply: dict[str, Any]) -> str | None:
        """What the template writes for a reply, without what ends the turn; None where it leaves out a thought.

        Raises:
          EncodingError: the template leaves out or changes what is not a thought.
        """
        assert self._template is not None
        content = reply["content"]
        if TOOL_CALLS in reply:
            # What the template writes after a text says where the calls end.
            end = self._template.turn_end
            if not text.endswith(end) or len(text) == len(end):
                raise EncodingError("the chat template ends tool calls in another way than text")
            if content.strip() not in text:
                raise EncodingError("the chat template leaves out what is said beside the tool calls")
            return text[: len(text) - len(end)]
        if text.endswith(self._template.turn_end):
            written = text[: len(text) - len(self._template.turn_end)]
        else:
            # Some templates trim what they are given, and some write a space before it, which is the completion's.
            candidates = (content, content.strip(), f" {content.strip()}")
            written = next((candidate for candidate in candidates if text.startswith(candidate)), "")
        *thoughts, answer = self._pieces(content)
        thoughts += self._pieces(reply.get(REASONING, ""))
        if not written.rstrip().endswith(answer):
            raise EncodingError("the chat template changes the completion")
        return written if all(piece in written for piece in thoughts) else None

    def _pieces(self, text: str) -> list[str]:
        """The text between the control tokens that the assistant emits, white space aside."""
        emitted = "|".join(map(re.escape, sorted(self._controls.emitted, key=len, reverse=True))) or r"(?!)"
        return [piece.strip() for piece in re.split(emitted, text)]

    def _served(self, opened: str, reply: dict[str, Any], counts: collections.Counter[tuple[str, str]]) -> str:
        """What the model would be seen to write behind a prompt that the template does not repeat."""
        text, thought = reply["content"], reply.get(REASONING)
        tokens = self._opened_thought(opened)
        if tokens is None:
            if thought is not None:
                raise EncodingError(f"the chat template leaves out the field {REASONING!r} of the completion")
            return text.strip()
        begin, end = tokens
        if thought is not None:
            text = f"{thought.strip()}\n{end}\n\n{text.lstrip()}"
        elif text.lstrip().startswith(begin):
            text = text.lstrip()[len(begin) :]
        if end not in text:
            counts["thought", "empty"] += 1
            return f"\n{end}\n\n{text.lstrip()}"
        return text.lstrip("\n") if opened.endswith("\n") else text

    def _opened_thought(self, opened: str) -> tuple[str, str] | None:
        """The tokens that begin and end a thought, where a prompt ends inside a thought that it opens."""
        tail = opened.rstrip()
        for begin in self._controls.emitted:
            end = begin.replace("<", "</", 1).replace("[", "[/", 1)
            if end in self._controls.emitted and end != begin and tail.endswith(begin):
                return begin, end
        return None

    @functools.cached_property
    def _shows_thoughts(self) -> bool:
        """Whether thoughts in a field of their own are written, or prompts end inside a thought that they open."""
        assert self._template is not None
        opens = any(self._opened_thought(end) is not None for end in self._template.prompt_ends)
        return opens or self._template.shows_reasoning

    def _plain_completion(self, reply: Message, mark: str) -> str:
        if TOOL_CALLS in reply:
            raise EncodingError("tool calls need a chat template")
        if REASONING in reply:
            raise EncodingError(f"the field {REASONING!r} of a completion needs a chat template")
        return self._controls.mask(reply["content"], mark, self._controls.emitted)

    def _without_end(self, reply: Message, counts: collections.Counter[tuple[str, str]]) -> Message:
        """A reply whose text does not end in an end token: the one real end token is added when it is encoded."""
        content = reply["content"]
        while end := next((end for end in self._ends if content.rstrip().endswith(end)), None):
            content = content.rstrip()[: -len(end)]
            counts["end", end] += 1
        if content == reply["content"]:
            return reply
        if not content.strip() and TOOL_CALLS not in reply:
            raise EncodingError("the completion is nothing but an end token")
        return {**reply, "content": content}

    # ------------------------------------------------------------------------------------------------ settings

    def _thinking(self, replies: Sequence[Message]) -> dict[str, Any]:
        """Whether the prompt invites a thought: where a completion holds one, unless the settings say."""
        assert self._template is not None
        if "enable_thinking" in self._template.settings:
            return {}
        return {"enable_thinking": any(map(self._has_thought, replies))} if self._template.can_think else _NO_THINKING

    def _has_thought(self, reply: Message) -> bool:
        names = self._controls.pattern.findall(reply["content"])
        return REASONING in reply or any(name in self._controls.emitted and _THOUGHT.search(name) for name in names)

    def _find_emitted(self, given: tuple[str, ...] | None, own: ChatTemplate | None) -> frozenset[str]:
        if given is None:
            return self._controls.find_emitted(own, self._ends)
        if unknown := [name for name in given if name not in self._controls.ids]:
            raise EncodingError(f"data.assistant_tokens names {unknown[0]!r}, which is no control token")
        return frozenset(given)


def _reply(completion: Completion) -> Message:
    return {"role": "assistant", "content": completion} if isinstance(completion, str) else completion


def _folded(messages: list[Message], system: int) -> list[Message]:
    """The messages, with the system turn at the beginning of the next user's turn."""
    user = next((i for i in range(system + 1, len(messages)) if messages[i]["role"] == "user"), None)
    if user is None:
        raise EncodingError("a system turn has no user's turn behind it to be put into")
    content = f"{messages[system]['content'].strip()}\n\n{messages[user]['content']}"
    folded = {**messages[user], "content": content}
    return [folded if i == user else message for i, message in enumerate(messages) if i != system]


def _contents(prompt: str | Sequence[Message]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]


def _unused_character(texts: list[str]) -> str:
    """A private-use character that is in none of the texts."""
    for code in range(0xE000, 0xF900):
        if not any(chr(code) in text for text in texts):
            return chr(code)
    raise EncodingError("text holds every private-use character")
