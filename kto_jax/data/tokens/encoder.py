"""From a prompt and its completions to token ids. Runs in worker processes: it imports transformers.

The prompt is what the chat template writes when the model is served: the conversation, closed by the generation prompt.
The completion is what the model would then write, closed by one end token. One of two rules gives it:

    template     the rendered conversation begins with the prompt: the completion is what the template writes after it
    served       it does not (the template drops thoughts, or the prompt opens one): the completion is the record's own
                 text, continued from where the prompt ends

control_tokens.py says which control strings keep their meaning in which text.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.data.rows.turns import REASONING, TOOL_CALLS, Completion, Message
from kto_jax.data.tokens import other_templates
from kto_jax.data.tokens.prompts import PromptEncoder, Rendering, contents_of, unused_character
from kto_jax.data.tokens.template import ANOTHER, EncodingError

__all__ = ["EncodedRecord", "Encoder", "EncodingError", "Rendering"]


@dataclasses.dataclass(frozen=True)
class EncodedRecord:
    """A prompt and its completions.

    Attributes:
      prompt: ids, closed by the generation prompt, int32.
      canonical: the prompt's ids on a fixed day and without settings, int32. Equal prompts have equal ids,
        whenever and however the record is rendered.
      completions: ids of each, closed by one end token, int32.
      counts: numbers of completions by treatment, by kind and name; see `Encoder.encode`.
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
      stop_ids: ids that end a completion; if a completion already ends in their text, the text is removed.
      rendering: how the template is used.

    Raises:
      EncodingError: `assistant_tokens` names a token that is not a control token.
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
        self.directory = directory
        self._eos_id = eos_id
        self.bos_id = bos_id
        ends = {eos_id, *stop_ids}
        self._prompts = PromptEncoder(directory, bos_id, has_chat_template, ends, rendering or Rendering())
        self._controls, self._template, self._ends = self._prompts.controls, self._prompts.template, self._prompts.ends

    def encode(self, prompt: str | list[Message], completions: Sequence[Completion]) -> EncodedRecord:
        """Encodes a prompt and its completions.

        Args:
          prompt: text (one user turn if there is a chat template) or messages.
          completions: texts, or messages that call tools or hold a thought.

        Returns:
          Ids and counts. The counts are, by kind: "rule" ("template", "served", "plain", or "rendered" where the prompt
          was rendered already), "end" (end tokens taken off, by token), "thought" ("empty": empty thoughts closed),
          "token" (control tokens kept in completions, by token), "text" (control strings in them that stay text) and
          "other_end" (end tokens of other models at their ends, which are text).

        Raises:
          EncodingError: the template refuses the record, or leaves out a part of it.
        """
        replies = [_reply(completion) for completion in completions]
        mark = unused_character([*contents_of(prompt), *(text for reply in replies for text in contents_of([reply]))])
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        replies = [self._without_end(reply, counts) for reply in replies]
        self._count_text(replies, counts)
        if self._template is None:
            texts = [self._plain_completion(reply, mark) for reply in replies]
            counts["rule", "rendered" if self._prompts.is_rendered(prompt) else "plain"] += len(texts)
            prompt_ids = canonical = self.encode_prompt(prompt)
            before = self._controls.mask(prompt, mark) if isinstance(prompt, str) else ""
        else:
            settings = self._prompts.thinking(replies)
            opened = before = self._prompts.render(prompt, mark, settings)
            texts = [self._completion(prompt, reply, mark, opened, settings, counts) for reply in replies]
            prompt_ids = np.asarray(self._prompts.ids(opened, mark), np.int32)
            canonical = self._prompts.canonical(prompt, mark, opened, prompt_ids)
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
        """Ids of a prompt, as `PromptEncoder.encode` gives them, int32."""
        return self._prompts.encode(prompt)

    def find_turn_end(self) -> int | None:
        """The control token that the chat template writes after a completion, ignoring white space.

            Fine.<|im_end|>\\n          <|im_end|>
            Fine. </s>                 </s>
            Fine.\\n### End\\n          None

        Returns:
          Its id, the first if there are several; None if text comes first, or nothing.

        Raises:
          EncodingError: the template refuses a conversation or changes it.
        """
        assert self._template is not None
        found = self._controls.pattern.match(self._template.turn_end.lstrip())
        return self._controls.ids[found[0]] if found else None

    @property
    def is_dated(self) -> bool:
        """Whether prompts depend on the time at which they are rendered."""
        return self._template is not None and self._template.is_dated

    @property
    def emitted(self) -> frozenset[str]:
        """The control tokens that keep their meaning in the assistant's text."""
        return self._controls.emitted

    def token(self, token_id: int) -> str:
        """The text of a token, for messages."""
        return self._controls.token(token_id)

    def _completion(
        self,
        prompt: str | list[Message],
        reply: Message,
        mark: str,
        opened: str,
        settings: Mapping[str, Any],
        counts: collections.Counter[tuple[str, str]],
    ) -> str:
        """The masked text of a completion after the rendered prompt `opened`."""
        template = self._template
        assert template is not None
        masked = self._prompts.masked(reply, mark)
        if REASONING in reply and not template.shows_reasoning and not self._prompts.opened_thought(opened):
            raise EncodingError(f"the chat template does not show the field {REASONING!r} of the completion{ANOTHER}")
        said = [*self._prompts.messages(prompt, mark), masked]
        whole = template.render(said, add_generation_prompt=False, **settings)
        if whole.startswith(opened):
            written = self._written(whole[len(opened) :], masked)
            if written is not None:
                counts["rule", "template"] += 1
                return written
        elif TOOL_CALLS in reply:
            raise EncodingError(f"the chat template changes the prompt when calls of tools are added{ANOTHER}")
        counts["rule", "served"] += 1
        return self._served(opened, masked, counts)

    def _written(self, text: str, reply: dict[str, Any]) -> str | None:
        """What the template writes for a reply, without the end of the turn; None if it omits a thought.

        Raises:
          EncodingError: the template omits or changes anything but a thought.
        """
        assert self._template is not None
        content = reply["content"]
        if TOOL_CALLS in reply:
            # What the template writes after plain text shows where tool calls end.
            end = self._template.turn_end
            if not text.endswith(end) or len(text) == len(end):
                raise EncodingError(f"the chat template ends tool calls in another way than text{ANOTHER}")
            if content.strip() not in text:
                raise EncodingError(f"the chat template leaves out what is said beside the tool calls{ANOTHER}")
            return text[: len(text) - len(end)]
        if text.endswith(self._template.turn_end):
            written = text[: len(text) - len(self._template.turn_end)]
        else:
            # Some templates trim the text, and some write a space before it, which belongs to the completion.
            candidates = (content, content.strip(), f" {content.strip()}")
            written = next((candidate for candidate in candidates if text.startswith(candidate)), "")
        *thoughts, answer = self._pieces(content)
        thoughts += self._pieces(reply.get(REASONING, ""))
        if not written.rstrip().endswith(answer):
            raise EncodingError(f"the chat template changes the completion{ANOTHER}")
        return written if all(piece in written for piece in thoughts) else None

    def _pieces(self, text: str) -> list[str]:
        """The text between the control tokens that the assistant emits, ignoring white space."""
        emitted = "|".join(map(re.escape, sorted(self._controls.emitted, key=len, reverse=True))) or r"(?!)"
        return [piece.strip() for piece in re.split(emitted, text)]

    def _served(self, opened: str, reply: dict[str, Any], counts: collections.Counter[tuple[str, str]]) -> str:
        """What the model would write after a prompt that the template does not repeat."""
        text, thought = reply["content"], reply.get(REASONING)
        tokens = self._prompts.opened_thought(opened)
        if tokens is None:
            if thought is not None:
                raise EncodingError(f"the chat template leaves out the field {REASONING!r} of the completion{ANOTHER}")
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

    def _plain_completion(self, reply: Message, mark: str) -> str:
        if TOOL_CALLS in reply:
            raise EncodingError("tool calls need a chat template; data.chat_template names a file")
        if REASONING in reply:
            raise EncodingError(
                f"the field {REASONING!r} of a completion needs a chat template; data.chat_template names a file"
            )
        return self._controls.mask(reply["content"], mark, self._controls.emitted)

    def _count_text(self, replies: list[Message], counts: collections.Counter[tuple[str, str]]) -> None:
        """Counts what looks like a control token in completions and is trained on as text."""
        for reply in replies:
            names = self._controls.pattern.findall(reply["content"])
            counts.update(("text", name) for name in names if name not in self._controls.emitted)
            if (end := other_templates.end_of(reply["content"])) and end not in self._controls.ids:
                counts["other_end", end] += 1

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


def _reply(completion: Completion) -> Message:
    return {"role": "assistant", "content": completion} if isinstance(completion, str) else completion
