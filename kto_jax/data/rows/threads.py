"""Conversations that branch: which messages lead to one, where messages name what they reply to.

Programs that let people ask again keep all answers in one list:

    id 1  user       Q?                    before 2: [1]
    id 2  assistant  A.    parent 1        before 3: [1]       2 is another answer to 1, not a turn before it
    id 3  assistant  B.    parent 1        before 4: [1, 3]
    id 4  user       R?    parent 3
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kto_jax.data.rows.turns import BadRowError

_IDS = ("id", "messageId", "message_id", "uuid")
_PARENTS = ("parentId", "parentMessageId", "parent_id", "parent_message_uuid")


def said_before(messages: list[Any], number: int) -> list[Any]:
    """The messages that lead to one of a list: all before it, or those that it names, if messages name others.

    Args:
      messages: objects, in the order in which they are kept.
      number: of the message, from 0.

    Raises:
      BadRowError: a message that it names is not there, or it replies to itself.
    """
    key = next((key for key in _IDS if all(isinstance(each.get(key), str) for each in messages)), "")
    found = {message[key]: message for message in messages} if key else {}
    if not found or len(found) < len(messages):
        return messages[:number]
    message = messages[number]
    parent = next((name for name in _PARENTS if any(_names_one(each.get(name), found) for each in messages)), None)
    if any(each.get("ancestors") for each in messages):
        ancestors = message.get("ancestors")
        path = [_named(name, found) for name in (ancestors if isinstance(ancestors, list) else [])]
    elif parent is not None:
        path = _path_to(message, parent, found)
    else:
        return messages[:number]
    # A system message may stand before the thread without being replied to.
    first = messages[0]
    is_left = number > 0 and first.get("role") in ("system", "developer") and all(each is not first for each in path)
    return [first, *path] if is_left else path


def _path_to(message: Any, parent: str, found: Mapping[str, Any]) -> list[Any]:
    path: list[Any] = []
    root = next(iter(found.values()))
    while (name := message.get(parent)) is not None and (_names_one(name, found) or message is not root):
        if len(path) == len(found):
            raise BadRowError("the message replies to itself")
        message = _named(name, found)
        path.append(message)
    return path[::-1]


def _names_one(name: Any, found: Mapping[str, Any]) -> bool:
    return isinstance(name, str) and name in found


def _named(name: Any, found: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in found:
        raise BadRowError(f"the conversation has no message {str(name)[:40]!r}, which is replied to")
    return found[name]
