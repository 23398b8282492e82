"""Chat templates: rendered by transformers' sandbox, within limits of time and memory. Runs in worker processes.

A template is an untrusted program. It sees plain data only, and its errors reject the record, not the run.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import json
import signal
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from kto_jax.data.rows.turns import REASONING, TOOL_CALLS, TOOLS

_RENDER_SECONDS = 1.0
_RENDER_BYTES = 512 << 20
_RENDER_CHARACTERS = 1 << 20
_TEXT = "-"
_PROBE = "probe_of_tools"
_CALL_ID = "a1b2c3d4e"
"""Some templates ask for nine letters and digits."""
_USER: dict[str, Any] = {"role": "user", "content": _TEXT}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": _TEXT}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    TOOL_CALLS: [{"id": _CALL_ID, "type": "function", "function": {"name": _PROBE, "arguments": {}}}],
}
FIXED_MOMENT = datetime.datetime(2024, 7, 26, 12)
"""The time that templates see if their output must not depend on the day."""

Messages = list[dict[str, Any]]


ANOTHER = "; data.chat_template names another"
"""What reads a record that a chat template cannot show, to be appended to the reason."""


class EncodingError(ValueError):
    """The record cannot be encoded; the message is the reason."""


class ChatTemplate:
    """A chat template, with everything besides the messages that determines its output.

    Args:
      source: Jinja text.
      special_tokens: `bos_token`, `eos_token` and the like, by name; templates may read them.
      settings: further variables that the template may read: `enable_thinking`, `reasoning_effort`, a date.
      moment: what `strftime_now` shows; None for `FIXED_MOMENT`.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
        moment: datetime.datetime | None = None,
    ):
        self.source = source
        self._special_tokens = dict(special_tokens)
        self.settings = dict(settings or {})
        self._moment = moment or FIXED_MOMENT

    @property
    def is_dated(self) -> bool:
        """Whether its output may depend on the time."""
        return "strftime_now" in self.source

    @property
    def can_think(self) -> bool:
        """Whether `enable_thinking` chooses between a prompt that invites a thought and one with an empty thought."""
        return "enable_thinking" in self.source

    def render(self, messages: Messages, *, add_generation_prompt: bool, **settings: Any) -> str:
        """The text of a conversation.

        Args:
          messages: turns; the first may have the role `TOOLS` and hold the tools as JSON.
          add_generation_prompt: whether to open the assistant's next turn.
          settings: variables in place of the template's own settings.

        Raises:
          EncodingError: the template refuses the messages, would leave out a part of them, or exceeds its limits.
        """
        if any(message.get(TOOL_CALLS) for message in messages) and not self._shows_tool_calls:
            raise EncodingError(f"the chat template does not show tool calls{ANOTHER}")
        if any(message["role"] == "tool" for message in messages) and not self._shows_results:
            raise EncodingError(f"the chat template does not show the messages of tools{ANOTHER}")
        if messages[0]["role"] != TOOLS:
            return self._apply(messages, None, add_generation_prompt, settings)
        if not self._shows_tools:
            raise EncodingError(f"the chat template does not show tools{ANOTHER}")
        return self._apply(messages[1:], json.loads(messages[0]["content"]), add_generation_prompt, settings)

    @functools.cached_property
    def turn_end(self) -> str:
        """What the template writes after the text of a last answer.

        Raises:
          EncodingError: the template refuses a user's turn and an answer, or changes them.
        """
        written = self._apply([_USER, {**_ANSWER, "content": _PROBE}], None, False, {})
        if _PROBE not in written:
            raise EncodingError(f"the chat template changes the completion{ANOTHER}")
        return written.rpartition(_PROBE)[2]

    @functools.cached_property
    def prompt_ends(self) -> tuple[str, ...]:
        """What may follow the user's text at the end of a prompt: the end of the turn and the generation prompt."""
        ends = []
        for thinking in (False, True):
            with contextlib.suppress(EncodingError):
                text = self._apply([{**_USER, "content": _PROBE}], None, True, {"enable_thinking": thinking})
                ends.append(text.rpartition(_PROBE)[2])
        return tuple(ends)

    @functools.cached_property
    def probes(self) -> dict[str, str]:
        """What the template writes for a plain answer, a tool call and a tool's result; "" if it refuses."""
        conversations: dict[str, Messages] = {
            "answer": [_USER, _ANSWER],
            "call": [_USER, _CALL],
            "result": [_USER, _CALL if self._shows_tool_calls else _ANSWER, self._result],
        }
        found = dict.fromkeys(conversations, "")
        for name, messages in conversations.items():
            with contextlib.suppress(EncodingError):
                found[name] = self._apply(messages, None, False, {})
        return found

    @functools.cached_property
    def shows_reasoning(self) -> bool:
        """Whether the template writes the thought of a last answer from a field of its own."""
        return self._shows(_USER, {**_ANSWER, REASONING: _PROBE})

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system turn, instead of refusing or omitting it."""
        return self._shows({"role": "system", "content": _PROBE}, _USER, last=0)

    @property
    def _result(self) -> dict[str, Any]:
        return {"role": "tool", "name": "-", "tool_call_id": _CALL_ID, "content": _PROBE}

    @functools.cached_property
    def _shows_tools(self) -> bool:
        probe = {"name": _PROBE, "description": "-", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": probe}]
        return _PROBE in self._apply([_USER], tools, True, {})

    @functools.cached_property
    def _shows_tool_calls(self) -> bool:
        return self._shows(_USER, _CALL)

    @functools.cached_property
    def _shows_results(self) -> bool:
        # Some templates accept results only after calls, others do not support calls.
        return self._shows(_USER, _CALL if self._shows_tool_calls else _ANSWER, self._result)

    def _shows(self, *messages: dict[str, Any], last: int = -1) -> bool:
        """Whether the template writes the probe because of one message, and not without that message."""
        without = [message for i, message in enumerate(messages) if i != last % len(messages)]
        written = []
        for seen in (list(messages), without):
            try:
                written.append(self._apply(seen, None, False, {}).count(_PROBE))
            except EncodingError:
                return False
        return written[0] > written[1]

    def _apply(
        self, messages: Messages, tools: list[Any] | None, add_generation_prompt: bool, settings: Mapping[str, Any]
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _showing(self._moment), _limits():
                rendered: Any = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self.source,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._special_tokens, **self.settings, **settings},
                )
            text = rendered[0][0]
        except Exception as error:
            # Any error is the fault of the record or the template.
            raise EncodingError(f"chat template: {type(error).__name__}: {str(error)[:100]}") from error
        given = sum(len(json.dumps(m)) for m in messages) + (len(json.dumps(tools)) if tools else 0)
        if len(text) > _RENDER_CHARACTERS + 4 * given:
            raise EncodingError(f"chat template: writes {len(text)} characters")
        return text


@contextlib.contextmanager
def _showing(moment: datetime.datetime) -> Iterator[None]:
    """Lets `strftime_now` show a given time: transformers takes the time from its module's `datetime`."""
    from transformers.utils import chat_template_utils as module

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:  # type: ignore[override]
            return moment

    with mock.patch.object(module, "datetime", Pinned):
        yield


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limits the time and memory of a chat template; a template can loop or build a huge string in one line."""
    import resource

    def expire(signum: int, frame: types.FrameType | None) -> None:
        # Again soon: the template may catch the exception, and a callback of the garbage collector has to end first.
        signal.setitimer(signal.ITIMER_PROF, _RENDER_SECONDS / 100)
        if not _in_callback(frame):
            raise TimeoutError(f"took more than {_RENDER_SECONDS:g} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _data_bytes() + _RENDER_BYTES
    allowed = [limit for limit in (bound, soft, hard) if limit != resource.RLIM_INFINITY]
    # CPU time, so that a busy machine does not reject records.
    previous = signal.signal(signal.SIGPROF, expire)
    resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), hard))
    signal.setitimer(signal.ITIMER_PROF, _RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, previous)


def _in_callback(frame: types.FrameType | None) -> bool:
    """Whether the garbage collector called this code; Python prints an exception raised there, and drops it."""
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in collecting or frame.f_code.co_name == "__del__":
            return True
        if frame.f_globals.get("__name__") in ("weakref", "_weakrefset"):
            return True
        frame = frame.f_back
    return False


def _data_bytes() -> int:
    """Writable private memory of this process in bytes; 0 if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 1 << 40
    return int(status.partition("VmData:")[2].split()[0]) << 10
