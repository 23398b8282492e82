"""Messages as programs log them: OpenAI's requests and answers, LangChain's messages, and what chat programs display.

{"messages": [{"role": "user", "content": "Q"}]}                       OpenAI's request
{"choices": [{"message": {"role": "assistant", "content": "A"}}]}      OpenAI's answer
{"id": [..., "HumanMessage"], "kwargs": {"content": "Q"}}              LangChain, serialised
{"type": "human", "data": {"content": "Q"}}                            LangChain, as dictionaries
{"generations": [[{"text": "A", "message": {...}}]]}                   LangChain's result
{"question": "Q"}                                                      the only text of an object
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from kto_jax.data.rows.message_forms import decoded
from kto_jax.data.rows.turns import BadRowError, lookup

_INSIDE = (
    *("messages", "message", "choices.0.message", "generations.0.0.message", "generations.0.0.text", "generations.0.0"),
    *("output", "input", "text", "content", "answer", "question", "args.0"),
)
"""Where an object holds the messages or the text, the first that is there."""
_LANGCHAIN = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
_DETAILS = re.compile(r"<details type=\"(\w+)\"[^>]*>\s*(?:<summary>.*?</summary>)?(.*?)</details>\s*", re.DOTALL)
_LONGEST_JSON = 1 << 20


def messages_of(value: Any) -> str | list[Any] | None:
    """The text or the messages in what a program logged.

    Args:
      value: input or output of a call, as an object, a list, text, or text that is JSON.

    Returns:
      Text, or messages with role and content; None if neither is there.
    """
    value = decoded(from_json(value))
    for _ in range(8):  # Deeper nesting does not occur in practice.
        if isinstance(value, str):
            return value if value.strip() else None
        if isinstance(value, list):
            inner = value[0] if len(value) == 1 and isinstance(value[0], list) else value
            found = [_message(each) for each in inner]
            return None if not found or None in found else found
        if not isinstance(value, Mapping):
            return None
        if (message := _message(value)) is not None:
            return [message]
        inside = next((held for name in _INSIDE if (held := lookup(value, name)) not in (None, "", [], {})), None)
        if inside is None and len(value) == 1:
            inside = next(iter(value.values()))
        value = decoded(inside)
    return None


def from_json(value: Any) -> Any:
    """A value that is stored as JSON text, parsed; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "[") or len(value) > _LONGEST_JSON:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _message(value: Any) -> dict[str, Any] | None:
    """One message with role and content, from OpenAI's or LangChain's form; None if it is no message."""
    if not isinstance(value, Mapping):
        return None
    if "role" in value:
        return dict(value)
    kind, held = value.get("type"), value
    if isinstance(value.get("kwargs"), Mapping) and isinstance(value.get("id"), list) and value["id"]:
        held, kind = value["kwargs"], str(value["id"][-1]).removesuffix("Chunk").removesuffix("Message").lower()
    elif isinstance(value.get("data"), Mapping):
        held = value["data"]
    if (
        not isinstance(kind, str)
        or kind.removesuffix("MessageChunk").lower() not in _LANGCHAIN
        or "content" not in held
    ):
        return None
    message = {"role": _LANGCHAIN[kind.removesuffix("MessageChunk").lower()], "content": held["content"]}
    more = held.get("additional_kwargs")
    more = more if isinstance(more, Mapping) else {}
    calls = held.get("tool_calls") or more.get("tool_calls")
    if isinstance(calls, list) and calls:
        message["tool_calls"] = [_call(call) for call in calls]
    # What LangChain has no field for is kept beside the others.
    beside = ("reasoning_content",) if calls else ("reasoning_content", "function_call")
    message |= {name: more[name] for name in beside if more.get(name)}
    if held.get("tool_call_id"):
        message["tool_call_id"] = held["tool_call_id"]
    return message


def _call(call: Any) -> Any:
    """A call of a tool with `arguments`, which LangChain calls `args`."""
    if isinstance(call, Mapping) and "args" in call and "function" not in call:
        return {"id": call.get("id"), "name": call.get("name"), "arguments": call["args"]}
    return call


def with_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose displayed thoughts are in `reasoning_content`, where chat templates look for them.

    Open WebUI keeps a thought as `<details type="reasoning" ...>`, each line quoted by "> " and escaped for HTML.

    Raises:
      BadRowError: the text displays something else that the model did not write, such as a tool call.
    """
    content = message.get("content")
    if not isinstance(content, str) or message.get("role") != "assistant" or "<details type=" not in content:
        return dict(message)
    thoughts = []
    for kind, text in _DETAILS.findall(content):
        if kind != "reasoning":
            raise BadRowError(f"the answer displays {kind!r}, which is not what the model wrote")
        lines = html.unescape(text).strip().splitlines()
        thoughts.append("\n".join(re.sub(r"^> ?", "", line) for line in lines))
    return {**message, "content": _DETAILS.sub("", content).strip(), "reasoning_content": "\n".join(thoughts)}
