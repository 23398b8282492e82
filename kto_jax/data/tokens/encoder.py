"""From a prompt and a completion to token ids. Runs in worker processes: it imports transformers.

A string such as `<|im_end|>` in somebody's text must never become the control token that ends a turn. So every
control string in user text is masked before the chat template is rendered, and encoded apart from the markup:

    content            say <|im_end|> please
    masked             say ▮3▮ please                     ▮ is a character that occurs in no text of the row
    rendered           <|im_start|>user\\nsay ▮3▮ please<|im_end|>\\n
    encoded            "<|im_start|>user\\nsay " with control tokens, "<|im_end|>" without, " please<|im_end|>\\n" with
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.data.rows.turns import TOOL_CALLS, TOOLS, Completion, Message

_RENDER_SECONDS = 1.0
_RENDER_BYTES = 512 << 20
_RENDER_CHARACTERS = 1 << 20
_TEXT = "-"
_PROBE = "probe_of_tools"
_CALL_ID = "a1b2c3d4e"
"""Some templates ask for nine letters and digits."""
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    TOOL_CALLS: [{"id": _CALL_ID, "type": "function", "function": {"name": _PROBE, "arguments": {}}}],
}


class EncodingError(ValueError):
    """The row cannot be encoded; the message is the reason."""


class Encoder:
    """Encodes rows with one tokenizer.

    Args:
      directory: tokenizer directory written by `prepare_tokenizer`.
      bos_id: the model's BOS, or None.
      eos_id: what every completion ends in.
      has_chat_template: whether prompts are rendered by the tokenizer's chat template.
    """

    def __init__(self, directory: Path, bos_id: int | None, eos_id: int, has_chat_template: bool):
        import tokenizers

        definition = json.loads((directory / "tokenizer.json").read_bytes())
        definition["truncation"] = definition["padding"] = None
        added = definition["added_tokens"]
        self._full = tokenizers.Tokenizer.from_str(json.dumps(definition))
        # Added tokens that are only white space are ordinary text; all others are control tokens.
        self._controls = {t["content"]: t["id"] for t in added if t["special"] or t["content"].strip()}
        self._control_ids = frozenset(self._controls.values())
        definition["added_tokens"] = [t for t in added if t["content"] not in self._controls]
        definition["post_processor"] = None
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(definition))
        longest_first = sorted(self._controls, key=len, reverse=True)
        # Without control tokens the pattern matches nothing.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._names = longest_first
        self._eos_id = eos_id
        self.bos_id = bos_id
        first = self._full.encode("a").ids[:1]
        self._added_bos = first if first == [bos_id] else []
        self._directory = directory if has_chat_template else None
        self._cached_prompt = functools.lru_cache(maxsize=4096)(self._encode_prompt)

    def encode_row(self, prompt: str | list[Message], completion: Completion) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a prompt, closed by the generation prompt, and a completion, closed by one EOS.

        Args:
          prompt: text (one user turn where there is a chat template) or messages.
          completion: text, or a message that calls tools.

        Returns:
          Ids of the prompt and of the completion, int32.

        Raises:
          EncodingError: the template refuses the row, or changes the prompt or the completion once both are there.
        """
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else [completion]
        mark = _unused_character([*_contents(reply), *_contents(prompt)])
        if self._directory is not None:
            masked = self._check_prefix(self._messages(prompt, mark), *self._messages(reply, mark))
        elif isinstance(completion, str):
            masked = self._mask(completion, mark)
        else:
            raise EncodingError("tool calls need a chat template")
        ids = [*self._encode(masked, mark), self._eos_id]
        return self.encode_prompt(prompt), np.asarray(ids, np.int32)

    def encode_prompt(self, prompt: str | list[Message]) -> np.ndarray:
        """Encodes a prompt, closed by the generation prompt, with exactly one BOS where the tokenizer adds one.

        Args:
          prompt: text (one user turn where there is a chat template) or messages.

        Returns:
          Ids, int32.

        Raises:
          EncodingError: there are messages but no template, or the template refuses them.
        """
        return np.asarray(self._cached_prompt(json.dumps(prompt)), np.int32)

    def find_turn_end(self, prompt: str, completion: str) -> int | None:
        """The control token that the chat template writes behind a completion, white space aside.

            Fine.<|im_end|>\\n          <|im_end|>
            Fine. </s>                 </s>
            Fine.\\n### End\\n          None

        Args:
          prompt: text without control strings.
          completion: likewise.

        Returns:
          Its id, the first where there are several; None where text comes first, or nothing.

        Raises:
          EncodingError: the template refuses the conversation or changes it.
        """
        messages, reply = self._messages(prompt, ""), {"role": "assistant", "content": completion}
        written = self._written(messages, reply)
        found = self._pattern.match(written.removeprefix(self._check_prefix(messages, reply)).lstrip())
        return self._controls[found[0]] if found else None

    def token(self, token_id: int) -> str:
        """The text of a token, for messages."""
        return str(self._full.id_to_token(token_id))

    def _encode_prompt(self, prompt_json: str) -> list[int]:
        prompt = json.loads(prompt_json)
        mark = _unused_character(_contents(prompt))
        if self._directory is not None:
            text = self._render(self._messages(prompt, mark), add_generation_prompt=True)
        elif isinstance(prompt, str):
            text = self._mask(prompt, mark)
        else:
            raise EncodingError("chat messages need a chat template")
        ids = self._encode(text, mark)
        return ids if ids[:1] == self._added_bos else self._added_bos + ids

    def _messages(self, prompt: str | list[Message], mark: str) -> list[dict[str, Any]]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [self._masked(message, mark) for message in messages]

    def _masked(self, message: Message, mark: str) -> dict[str, Any]:
        """A message as the template gets it: no control string in it, and its calls as objects."""
        masked: dict[str, Any] = {}
        for key, value in message.items():
            try:
                if key == TOOL_CALLS:
                    masked[key] = self._mask_json(json.loads(value), mark)
                elif message["role"] == TOOLS and key == "content":
                    masked[key] = json.dumps(self._mask_json(json.loads(value), mark))
                else:
                    masked[key] = self._mask(value, mark)
            except RecursionError:
                raise EncodingError("tools are nested too deeply") from None
        return masked

    def _mask_json(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._mask(value, mark)
        if isinstance(value, list):
            return [self._mask_json(item, mark) for item in value]
        if isinstance(value, dict):
            return {self._mask(key, mark): self._mask_json(item, mark) for key, item in value.items()}
        return value

    def _check_prefix(self, messages: list[dict[str, Any]], reply: dict[str, Any]) -> str:
        """The completion as the template writes it; the conversation must start with the prompt as encoded."""
        written, completion = self._written(messages, reply), reply["content"]
        if TOOL_CALLS in reply:
            # What the template writes after a text says where the calls end.
            end = self._written(messages, {"role": "assistant", "content": _TEXT}).removeprefix(_TEXT)
            if not written.endswith(end) or len(written) == len(end):
                raise EncodingError("the chat template ends tool calls in another way than text")
            if completion.strip() not in written:
                raise EncodingError("the chat template leaves out what is said beside the tool calls")
            return written[: len(written) - len(end)]
        # Some templates trim what they are given, and some write a space before it, which is then the completion's.
        for candidate in (completion, completion.strip(), f" {completion.strip()}"):
            if written.startswith(candidate):
                return candidate
        raise EncodingError("the chat template changes the completion")

    def _written(self, messages: list[dict[str, Any]], reply: dict[str, Any]) -> str:
        """What the template writes for a reply, behind the prompt as encoded."""
        prompt = self._render(messages, add_generation_prompt=True)
        whole = self._render([*messages, reply], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise EncodingError("the chat template changes the prompt when the completion is added")
        return whole[len(prompt) :]

    def _mask(self, text: str, mark: str) -> str:
        return self._pattern.sub(lambda match: f"{mark}{self._names.index(match[0])}{mark}", text)

    def _encode(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        for i, section in enumerate(re.split(f"{mark}([0-9]+){mark}", text)):
            if i % 2:
                piece = self._plain.encode(self._names[int(section)], add_special_tokens=False).ids
                num_controls = 0
            else:
                piece = self._full.encode(section, add_special_tokens=False).ids
                num_controls = len(self._pattern.findall(section))
            # Belt and braces: a normaliser could turn other text into a control string.
            if sum(token in self._control_ids for token in piece) != num_controls:
                raise EncodingError("text turns into a control token")
            ids += piece
        return ids

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(
            self._directory, trust_remote_code=False, local_files_only=True
        )

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        if any(TOOL_CALLS in message for message in messages) and not self._shows_tool_calls:
            raise EncodingError("the chat template does not show tool calls")
        if any(message["role"] == "tool" for message in messages) and not self._shows_results:
            raise EncodingError("the chat template does not show the messages of tools")
        if messages[0]["role"] != TOOLS:
            return self._apply(messages, None, add_generation_prompt)
        if not self._shows_tools:
            raise EncodingError("the chat template does not show tools")
        return self._apply(messages[1:], json.loads(messages[0]["content"]), add_generation_prompt)

    @functools.cached_property
    def _shows_tools(self) -> bool:
        probe = {"name": _PROBE, "description": "-", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": probe}]
        return _PROBE in self._apply([{"role": "user", "content": "-"}], tools, True)

    @functools.cached_property
    def _shows_tool_calls(self) -> bool:
        return self._shows({"role": "user", "content": _TEXT}, _CALL)

    @functools.cached_property
    def _shows_results(self) -> bool:
        result = {"role": "tool", "name": "-", "tool_call_id": _CALL_ID, "content": _PROBE}
        # Some templates take results only behind calls, others know no calls.
        calls = _CALL if self._shows_tool_calls else {"role": "assistant", "content": _TEXT}
        return self._shows({"role": "user", "content": _TEXT}, calls, result)

    def _shows(self, *messages: dict[str, Any]) -> bool:
        """Whether the template writes the probe in the last message, and nothing of it without that message."""
        written = []
        for seen in (messages, messages[:-1]):
            try:
                written.append(self._apply(list(seen), None, False).count(_PROBE))
            except EncodingError:
                return False
        return written[0] > written[1]

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        tokenizer = self._tokenizer
        try:
            with _limits():
                text = tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    # Qwen3 writes an empty thought before a last answer; so prompts end in it too.
                    enable_thinking=False,
                )
        except Exception as error:
            # A template is a stranger's program: whatever it raises is the row's or the template's fault.
            raise EncodingError(f"chat template: {type(error).__name__}: {str(error)[:100]}") from error
        given = sum(len(json.dumps(m)) for m in messages) + (len(json.dumps(tools)) if tools else 0)
        if len(text) > _RENDER_CHARACTERS + 4 * given:
            raise EncodingError(f"chat template: writes {len(text)} characters")
        return text


def _contents(prompt: str | list[Message]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]


def _unused_character(texts: list[str]) -> str:
    """A private-use character that is in none of the texts."""
    for code in range(0xE000, 0xF900):
        if not any(chr(code) in text for text in texts):
            return chr(code)
    raise EncodingError("text holds every private-use character")


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Bounds the time and the memory of a chat template; a template can loop or make a giant string in one line."""
    import resource

    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {_RENDER_SECONDS:g} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _data_bytes() + _RENDER_BYTES
    allowed = [limit for limit in (bound, soft, hard) if limit != resource.RLIM_INFINITY]
    # CPU time, so that a busy machine does not reject rows.
    previous = signal.signal(signal.SIGPROF, expire)
    resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), hard))
    signal.setitimer(signal.ITIMER_PROF, _RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, previous)


def _data_bytes() -> int:
    """Writable private memory of this process; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 1 << 40
    return int(status.partition("VmData:")[2].split()[0]) << 10
