"""Messages in the forms that programs write, in one form: role, content, and a thought or calls of tools beside it.

{"role": "user", "content": "Q"}                                                         OpenAI's chat
{"from": "human", "value": "Q"}                                                          ShareGPT
{"role": "assistant", "content": [{"type": "thinking", ...}, {"type": "tool_use", ...}]} Anthropic
{"role": "model", "parts": [{"text": "A"}, {"functionCall": ...}]}                       Gemini
{"role": "assistant", "parts": [{"type": "reasoning", ...}, {"type": "text", ...}]}      Vercel's AI SDK
{"type": "function_call", "name": "f", "arguments": "{}"}                                OpenAI's responses

Whole requests and answers of these interfaces are conversations too. A list of messages may be kept as JSON or Python
text. What has another form is left as it is, and rejected by name where it is checked: `kto_jax.data.rows.turns`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

REASONING = "reasoning_content"
"""Key of the thought that an assistant's message has in a field of its own."""
TOOL_CALLS = "tool_calls"
"""Key of the calls of a message."""
_NO_ROLES: Mapping[str, str] = {}
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
"""In any case: "Human", "GPT"."""
_GEMINI_ROLES = {"model": "assistant", "function": "tool"}
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value|parts)["']\s*:""")
_OBJECT_AS_TEXT = re.compile(
    r"""\s*\{.*["'](?:role|messages|contents|choices|candidates)["']\s*:\s*["'\[]""", re.DOTALL
)
_LONGEST_TEXT = 1 << 20
"""Characters of a text that is tried as messages."""
_TEXT_TYPES = ("text", "input_text", "output_text")
_THOUGHTS = {"thinking": ("thinking",), "reasoning": ("text", "reasoning"), "think": ("think",)}
"""Types of parts that hold a thought, and where."""
_EMPTY_TYPES = ("step-start", "step-finish")
"""Types of parts that hold nothing."""
_CALL_TYPES = ("tool_use", "tool-call")
_RESULT_TYPES = ("tool_result", "tool-result")


def decoded(value: Any, roles: Mapping[str, str] = _NO_ROLES) -> Any:
    """Messages in one form; any other value as it is.

        '[{"role": "user", "content": "Q"}]'        [{"role": "user", "content": "Q"}]      text, JSON or Python's
        [{"from": "human", "value": "Q"}]           [{"role": "user", "content": "Q"}]      another program's names
        [{"role": "customer", "content": "Q"}]      [{"role": "user", "content": "Q"}]      roles={"customer": "user"}
        {"system": "S", "messages": [...]}          [{"role": "system", ...}, ...]          a request
        {"choices": [{"message": {...}}]}           [{"role": "assistant", ...}]            an answer

    Args:
      value: of a row.
      roles: what other words for roles mean (`data.roles`).
    """
    value = _parsed(value)
    if isinstance(value, Mapping):
        found = conversation_in(value)
        value = value if found is None else found
    if not isinstance(value, list):
        return value
    if not any(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value):
        text = text_of(value)  # The parts of one message.
        if isinstance(text, str):
            return text
    if any(isinstance(item, Mapping) and item.get("type") in _RESPONSES for item in value):
        value = _from_responses(value)
    return [each for message in value for each in _in_one_form(message, roles)]


def conversation_in(value: Mapping[str, Any]) -> list[Any] | None:
    """The messages of a request or an answer; None if it is neither, or offers tools, which are no messages."""
    if value.get("tools") or value.get("functions"):
        return None
    if isinstance(value.get("role"), str) and ("content" in value or "parts" in value):
        return [value]
    if isinstance(value.get("from"), str) and isinstance(value.get("value"), str):
        return [value]
    for name in ("messages", "contents", "input"):
        if isinstance(value.get(name), list) and all(isinstance(each, Mapping) for each in value[name]):
            return [*_system_of(value), *value[name]]
    if isinstance(value.get("input"), str) and value.get("instructions"):
        return [*_system_of(value), {"role": "user", "content": value["input"]}]
    if isinstance(value.get("output"), list) and all(isinstance(each, Mapping) for each in value["output"]):
        return list(value["output"])
    for name, held in (("choices", "message"), ("candidates", "content")):
        answers = value.get(name)
        if isinstance(answers, list) and len(answers) == 1 and isinstance(answers[0], Mapping):
            message = answers[0].get(held)
            return [message] if isinstance(message, Mapping) else None
    return None


def _system_of(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system message that a request holds beside its messages."""
    names = ("system", "instructions", "systemInstruction", "system_instruction")
    text = next((text_of(request[name]) for name in names if request.get(name)), None)
    return [] if text is None else [{"role": "system", "content": text}]


def text_of(value: Any) -> Any:
    """The text of one block or of several, of a content or of an object with parts; any other value as it is."""
    blocks = value.get("parts", [value]) if isinstance(value, Mapping) else value
    texts = [_plain_text(block) for block in blocks] if isinstance(blocks, list) else [None]
    return value if None in texts or not texts else "".join(map(str, texts))


def _plain_text(part: Any) -> str | None:
    """The text of a part that is text and nothing else."""
    if not isinstance(part, Mapping) or part.get("thought") or part.get("type", "text") not in _TEXT_TYPES:
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _in_one_form(message: Any, roles: Mapping[str, str]) -> list[Any]:
    """A message, or the several that one of another form stands for."""
    if not isinstance(message, Mapping):
        return [message]
    speaker = message.get("role", message.get("from"))
    if "role" not in message and "from" in message:
        message = {**message, "role": speaker, "content": message.get("value", message.get("content"))}
        usual = _SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        roles = {speaker: usual, **roles} if usual else roles
    if isinstance(message.get("parts"), list) and not message.get("content"):
        message = {name: value for name, value in message.items() if name != "parts"} | {"content": message["parts"]}
        roles = {**_GEMINI_ROLES, **roles}
    if isinstance(speaker, str) and speaker in roles:
        message = {**message, "role": roles[speaker]}
    return _unfolded(message)


def _unfolded(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A message whose parts are not only text: its thought and calls in fields, and results of tools before it."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        return [message]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    results: list[Any] = []
    for part in parts:
        if (text := _plain_text(part)) is not None and not calls:
            texts.append(text)
        elif isinstance(thought := _thought(part), str) and message.get("role") == "assistant" and not texts + calls:
            thoughts.append(thought)
        elif (call := _call(part)) is not None:
            calls.append(call)
        elif (result := _result(part)) is not None and not texts:
            results.append(result)
        elif not (isinstance(part, Mapping) and part.get("type") in _EMPTY_TYPES):
            return [message]  # Another kind of part, or another order, which no template can show.
    if (calls and message.get(TOOL_CALLS)) or (thoughts and message.get(REASONING)):
        return [message]
    own = {**message, "content": "".join(texts)}
    own |= {REASONING: "\n".join(thoughts)} if "".join(thoughts).strip() else {}
    own |= {TOOL_CALLS: calls} if calls else {}
    return [*results, *([own] if texts or calls or not results else [])]


def _thought(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return None
    if part.get("thought") is True:
        return part.get("text")
    names = _THOUGHTS.get(str(part.get("type")), ())
    return next((part[name] for name in names if isinstance(part.get(name), str)), None)


def _call(part: Any) -> Any:
    """A call of a tool, from a part or an item of Anthropic, Gemini, Vercel or OpenAI's responses."""
    if not isinstance(part, Mapping):
        return None
    if isinstance(made := part.get("functionCall"), Mapping):
        return {"name": made.get("name"), "arguments": made.get("args")}
    if part.get("type") not in (*_CALL_TYPES, "function_call"):
        return None
    key = next((part[name] for name in ("call_id", "toolCallId", "id") if part.get(name)), None)
    given = next((part[name] for name in ("arguments", "input", "args") if name in part), None)
    return {"id": key, "name": part.get("name", part.get("toolName")), "arguments": given}


def _result(part: Any) -> Any:
    """The message of a tool, from a part with its result."""
    if not isinstance(part, Mapping):
        return None
    if isinstance(given := part.get("functionResponse"), Mapping):
        said = given.get("response")
        return {"role": "tool", "name": given.get("name"), "content": None if said is None else json.dumps(said)}
    if part.get("type") not in (*_RESULT_TYPES, "function_call_output"):
        return None
    key = next((part[name] for name in ("call_id", "toolCallId", "tool_use_id") if part.get(name)), None)
    said = next((part[name] for name in ("content", "output", "result") if name in part), None)
    said = said["value"] if isinstance(said, Mapping) and set(said) == {"type", "value"} else text_of(said)
    said = said if isinstance(said, str | list | None) else json.dumps(said)
    return {"role": "tool", "tool_call_id": key, "content": said}


_RESPONSES = ("reasoning", "function_call", "function_call_output")
"""Types of items of OpenAI's responses that are no messages by themselves."""


def _from_responses(items: Sequence[Any]) -> list[Any]:
    """The items of OpenAI's responses as messages: a thought and calls belong to the message beside them."""
    messages: list[Any] = []
    thought, may_call = "", False
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "reasoning" and isinstance(item.get("summary"), list):
            texts = [part.get("text") for part in item["summary"] if isinstance(part, Mapping)]
            thought += "\n".join(map(str, texts))
            may_call = False
        elif kind == "function_call":
            calls = messages[-1].get(TOOL_CALLS) or [] if may_call and not thought else None
            if not isinstance(calls, list):
                messages.append({"role": "assistant", "content": ""})
                calls = []
            messages[-1] = {**messages[-1], TOOL_CALLS: [*calls, _call(item)]}
            may_call = True
        elif kind == "function_call_output":
            messages.append(_result(item))
            may_call = False
        else:
            messages.append(item)
            may_call = isinstance(item, Mapping) and item.get("role") == "assistant"
        if thought and may_call and not messages[-1].get(REASONING):
            messages[-1] = {**messages[-1], REASONING: thought}
            thought = ""
    # A thought that no message follows is an item of its own, which is rejected by its missing role.
    return messages if not thought else [*messages, {"type": "reasoning"}]


def _parsed(value: Any) -> Any:
    """A list of messages, a request or an answer that is kept as text; any other value as it is."""
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        return value
    is_list = bool(_MESSAGES_AS_TEXT.match(value))
    if not is_list and not _OBJECT_AS_TEXT.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(value)
            if is_list and isinstance(found, list) and found and all(isinstance(each, dict) for each in found):
                return found
            # With tools it is a request too, which is then rejected by name.
            if isinstance(found, dict) and conversation_in({**found, "tools": None, "functions": None}) is not None:
                return found
    return value
