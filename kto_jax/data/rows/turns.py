"""Texts and chat messages of a row: checked, and split into a prompt and its completions.

A value may hold a whole conversation, which begins with the prompt: as messages, or as a transcript,

    \\n\\nHuman: Hello?\\n\\nAssistant: Hi.

Its last turn is the completion and all turns before it are the prompt.

The content of a message is text, or a list of parts that are text, which are joined. A message of the assistant's may
call tools, with or without content.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from kto_jax.data.rows.message_forms import REASONING, TOOL_CALLS

__all__ = [
    "REASONING", "ROLES", "SAME_COMPLETIONS", "TOOLS", "TOOL_CALLS", "TOOL_FIELDS", "BadRowError", "Completion",
    "Message", "Prompt", "check_prompt", "check_role", "check_text", "described", "lookup", "message_of", "part",
    "present", "turns_of_transcript", "with_tools",
]  # fmt: skip

Message = dict[str, str]
"""Role and content; of an assistant's message its calls of tools as JSON and its thought; of a tool's its name."""
Prompt = str | list[Message]
Completion = str | Message
"""Text, or the message of an assistant that calls tools."""

TOOLS = "tools"
"""Role of a first message that holds, as JSON, the tools that the chat template lists. No row may use it."""
_REASONING_FIELDS = (REASONING, "reasoning", "thinking", "thought")
"""What the field is called by those who write files; the first that is there counts."""
_ATTACHED = (
    *("files", "attachments", "experimental_attachments", "images", "image", "image_url", "audio", "videos", "video"),
)
"""Fields of a message for what is not text."""
TOOL_FIELDS = ("name", "tool_call_id")
"""Optional fields of a tool's message."""
SAME_COMPLETIONS = "chosen and rejected are the same"
"""Reason for rejecting a pair of equal completions."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak."""
_OTHER_WORDS = {
    **dict.fromkeys(("ai", "apimessage", "bot", "chatbot", "gpt", "model", "chatgpt", "agent"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "environment", "tool_result", "function_response"), "tool"),
}
"""What other words for roles usually mean, beside the user's; none is mapped without being set."""
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_OPEN_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class BadRowError(ValueError):
    """The row is rejected; the message is the reason."""


_ABSENT = object()


def lookup(fields: Any, name: str, default: Any = None) -> Any:
    """A field by its name, or by a dotted path into objects and lists.

        {"data": {"rating": 1}}        "data.rating"     1
        {"votes": [{"value": 3}]}      "votes.0.value"   3
        {"data.rating": 1}             "data.rating"     1       the whole name comes first

    Args:
      fields: a row, or a value inside it.
      name: name or path.
      default: returned if nothing is there.
    """
    if isinstance(fields, Mapping):
        if name in fields:
            return fields[name]
        head, dot, rest = name.partition(".")
        return lookup(fields[head], rest, default) if dot and head in fields else default
    if isinstance(fields, list):
        head, dot, rest = name.partition(".")
        if head.isdecimal() and int(head) < len(fields):
            return lookup(fields[int(head)], rest, default) if dot else fields[int(head)]
    return default


def present(fields: Mapping[str, Any], name: str) -> Any:
    """A field that must be there, by its name or a dotted path.

    Raises:
      BadRowError: it is missing or null.
    """
    value = lookup(fields, name, _ABSENT)
    if value is _ABSENT:
        raise BadRowError(f"missing field {name!r}")
    if value is None:
        raise BadRowError(f"null field {name!r}")
    return value


def described(value: Any) -> str:
    """What a value is, in JSON's words, for reasons."""
    if isinstance(value, Mapping):
        names = ", ".join(repr(str(name)[:20]) for name in list(value)[:4])
        return f"an object with {names}{', ...' if len(value) > 4 else ''}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def check_text(value: Any, name: str) -> str:
    """Text that is not blank and can be written as UTF-8.

    Raises:
      BadRowError: it is not.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text but {described(value)}")
    if not value.strip():
        raise BadRowError(f"empty {name}")
    if "\0" in value:
        raise BadRowError(f"NUL character in {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"lone surrogate in {name}") from None
    return value


def check_prompt(value: Any) -> Prompt:
    """Text, or messages of which the last is not the assistant's.

    Raises:
      BadRowError: it is neither.
    """
    if not isinstance(value, list):
        return check_text(value, "prompt")
    if not value:
        raise BadRowError("empty prompt")
    messages = [_message(message, "prompt") for message in value]
    if messages[-1]["role"] == "assistant":
        raise BadRowError("prompt ends with an assistant message")
    if messages[-1]["role"] in ("system", "developer"):
        raise BadRowError("prompt has no message after the system message")
    return messages


def part(prompt: Any, replies: Mapping[str, Any], *, may_lack: bool = False) -> tuple[Prompt, list[Completion]]:
    """Splits the content of a row into its prompt and its completions.

        prompt      chosen              rejected            gives
        "Q"         "A"                 "B"                 Q → A, B
        "Q"         [user Q, A]         [user Q, B]         Q → A, B        the prompt is repeated
        [user Q]    [assistant A]       "B"                 [user Q] → A, B
        none        [user Q, A]         [user Q, B]         [user Q] → A, B
        none        "\\n\\nHuman: Q\\n\\nAssistant: A"  …        [user Q] → A, B
        none        [user Q, A]         "B"                 [user Q] → A, B

    Args:
      prompt: text or messages; None, empty text or no messages where the replies hold it.
      replies: the replies by their names in error messages; of one row, hence of one prompt.
      may_lack: whether the replies may hold the prompt.

    Returns:
      The prompt, and the completion of each reply: its text, or its message where that calls tools.

    Raises:
      BadRowError: a value is not as above, or the replies are not of one prompt.
    """
    lacks = prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip())
    own = None if may_lack and lacks else check_prompt(prompt)
    heads: list[list[Message]] = []
    completions: list[Completion] = []
    is_transcript = own is None and not any(isinstance(value, list) for value in replies.values())
    for name, value in replies.items():
        if is_transcript and isinstance(value, str):
            value = _transcript(value, name)
        if not isinstance(value, list):
            completions.append(check_text(value, name))
            continue
        if not value:
            raise BadRowError(f"empty {name}")
        *head, last = [_message(message, name) for message in value]
        if own is not None and head and not _repeats(head, own):
            raise BadRowError(f"{name} is not one message")
        if last["role"] != "assistant":
            raise BadRowError(f"{name} has role {last['role']!r}, not 'assistant'")
        completions.append(last if {TOOL_CALLS, REASONING} & last.keys() else last["content"])
        if head or own is None:
            heads.append(head)
    if own is not None and not heads:
        return own, completions
    heads = [head for head in heads if head] or heads
    if any(head != heads[0] for head in heads):
        raise BadRowError(f"{' and '.join(replies)} part before their last message")
    if own is None:
        return check_prompt(heads[0]), completions
    # If the replies repeat a longer conversation, that is the prompt; an equally long one changes nothing.
    longer = len(heads[0]) > (1 if isinstance(own, str) else len(own))
    return (heads[0] if longer else own), completions


def with_tools(prompt: Prompt, tools: Any) -> Prompt:
    """A prompt with the tools that its assistant may call.

    Args:
      prompt: text or messages.
      tools: JSON schemas, as a list of objects or as text that is one; None or nothing for no tools.

    Returns:
      The prompt, or messages of which the first has the role `TOOLS`.

    Raises:
      BadRowError: the tools are neither.
    """
    if not tools:
        return prompt
    try:
        schemas = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        raise BadRowError("tools is not JSON") from None
    text = _json(schemas, "tools")
    if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
        raise BadRowError("tools is not a list of objects")
    if not schemas:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": TOOLS, "content": check_text(text, "tools")}, *messages]


def message_of(message: Message) -> dict[str, Any]:
    """A message as a row holds it: its calls are objects."""
    return {key: json.loads(value) if key == TOOL_CALLS else value for key, value in message.items()}


def _repeats(head: list[Message], prompt: Prompt) -> bool:
    """Whether the turns before a completion are those of the prompt, or of a conversation that the prompt is from."""
    if isinstance(prompt, str):
        said = [message["content"].strip() for message in head if message["role"] == "user"]
        return head[-1]["role"] != "assistant" and bool(said) and prompt.strip() in (said[0], said[-1])
    return head == prompt[-len(head) :] or head[-len(prompt) :] == prompt


def turns_of_transcript(prompt: Any) -> Any:
    """The turns of a prompt that is a transcript up to the assistant's next turn; any other prompt as it is.

    "\\n\\nHuman: Q\\n\\nAssistant:"        [user Q]
    """
    if not isinstance(prompt, str) or not _OPEN_TRANSCRIPT.fullmatch(prompt):
        return prompt
    return _transcript(prompt, "prompt")[:-1]


def _transcript(value: str, name: str) -> list[Message]:
    pieces = _TURN.split(check_text(value, name))
    if pieces[0].strip() or len(pieces) == 1:
        raise BadRowError(
            f"no prompt, and {name} is not a transcript of Human and Assistant; data.layout='trl' takes what both "
            "texts begin with as the prompt"
        )
    return [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def check_role(role: Any, name: str) -> str:
    """One of `ROLES`.

    Raises:
      BadRowError: it is none, with the setting that maps it.
    """
    if role in ROLES:
        return str(role)
    setting = ""
    if isinstance(role, str):
        usual = role.lower() if role.lower() in ROLES else _OTHER_WORDS.get(role.lower(), "user")
        setting = f"; data.roles={{{role[:40]!r}: {usual!r}}} maps it"
    raise BadRowError(f"role of the {name} is not known: {str(role)[:40]!r}{setting}")


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRowError(f"message of the {name} is not an object but {described(message)}")
    role = check_role(message.get("role"), name)
    if attached := next((field for field in _ATTACHED if message.get(field)), None):
        raise BadRowError(f"message of the {name} has {attached!r}, which is not text; only text is trained on")
    calls = _tool_calls(_calls_of(message, name), role, name)
    content = _joined(message.get("content"), name)
    if calls and (content is None or (isinstance(content, str) and not content.strip())):
        return {"role": role, "content": "", **calls, **_reasoning(message, role, name)}
    if "content" not in message:
        raise BadRowError(f"message of the {name} has no content")
    named = {key: check_text(message[key], key) for key in TOOL_FIELDS if role == "tool" and message.get(key)}
    return {"role": role, "content": check_text(content, name), **calls, **named, **_reasoning(message, role, name)}


def _reasoning(message: Mapping[str, Any], role: str, name: str) -> dict[str, str]:
    """The thought of a message, where it has one in a field of its own."""
    field = next((field for field in _REASONING_FIELDS if message.get(field)), None)
    if field is None:
        return {}
    if role != "assistant":
        raise BadRowError(f"{field} of the {name} on a message that is not the assistant's")
    return {REASONING: check_text(message[field], f"{field} of the {name}")}


def _joined(content: Any, name: str) -> Any:
    """The text of a content that is a list of parts; any other content unchanged."""
    if not isinstance(content, list):
        return content
    for piece in content:
        if not isinstance(piece, Mapping):
            raise BadRowError(f"part of the {name} is not an object but {described(piece)}")
        if piece.get("type") != "text":
            kind = piece.get("type")
            raise BadRowError(f"part of the {name} has type {kind if kind is None else str(kind)[:40]!r}, not 'text'")
        if not isinstance(piece.get("text"), str):
            raise BadRowError(f"text of a part of the {name} is {described(piece.get('text'))}")
    return "".join(piece["text"] for piece in content)


def _calls_of(message: Mapping[str, Any], name: str) -> Any:
    """The calls of a message, also where it has the single `function_call` of OpenAI's first interface."""
    calls, call = message.get(TOOL_CALLS), message.get("function_call")
    if calls and call:
        raise BadRowError(f"message of the {name} has both {TOOL_CALLS!r} and 'function_call'")
    return [call] if call else calls


def _tool_calls(calls: Any, role: str, name: str) -> dict[str, str]:
    """The calls of a message as chat templates read them, with arguments that are an object; nothing without calls."""
    if not calls:
        return {}
    if role != "assistant":
        raise BadRowError(f"{TOOL_CALLS} of the {name} on a message that is not the assistant's")
    if not isinstance(calls, list):
        raise BadRowError(f"{TOOL_CALLS} of the {name} is not a list but {described(calls)}")
    return {TOOL_CALLS: check_text(_json([_tool_call(call, name) for call in calls], TOOL_CALLS), TOOL_CALLS)}


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise BadRowError(f"tool call of the {name} is not an object with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise BadRowError(f"arguments of a tool call of the {name} are not a JSON object")
    own = {"id": check_text(call["id"], "id of a tool call")} if call.get("id") else {}
    called = {"name": check_text(function.get("name"), "name of a tool call"), "arguments": arguments}
    return {**own, "type": "function", "function": called}


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise BadRowError(f"{name} is not JSON") from None
