"""OpenAssistant's trees: replies to one message, ranked by people, become pairs of neighbours in rank.

    oasst           one message a row: message_id, parent_id, role, text, rank. Holds a whole file in memory.
    oasst_trees     one tree a row: prompt, a message with its replies, which have replies of their own

Replies without a rank, with equal rank, deleted, or without siblings make no pair; they are skipped with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.layout import Examples, Fields, Layout, Rows, Skip, by_row, has, named
from kto_jax.data.rows.rejection import Rejection, Skipped
from kto_jax.data.rows.turns import BadRowError, Message, present

_ROLES = {"prompter": "user", "assistant": "assistant"}
_NAMES = {key: key for key in ("prompt", "chosen", "rejected")}


@dataclasses.dataclass
class _Tree:
    """Messages by id, each with its fields, and the replies to each that have been read."""

    found: dict[str, Fields] = dataclasses.field(default_factory=dict)
    replies: dict[str, list[str]] = dataclasses.field(default_factory=lambda: defaultdict(list))

    def add(self, key: str, parent: Any, message: Fields) -> None:
        self.found[key] = {**message, "parent_id": parent}
        if isinstance(parent, str) and message.get("role") == "assistant":
            self.replies[parent].append(key)

    def pairs(self) -> Iterator[tuple[str, Fields | Skip | BadRowError]]:
        """For each reply that completes a pair or makes none: its id, and an example or the reason for none."""
        for parent, keys in self.replies.items():
            ranked = sorted((self._rank(key), key) for key in keys if self._rank(key) is not None)
            for key in keys:
                if self._rank(key) is None:
                    deleted = bool(self.found[key].get("deleted"))
                    yield key, Skip("a deleted reply" if deleted else "a reply without a rank")
            if len(ranked) == 1:
                yield ranked[0][1], Skip("the only ranked reply to its message")
            for (better_rank, better), (rank, worse) in itertools.pairwise(ranked):
                if better_rank == rank:
                    yield worse, Skip("a reply of the same rank as another")
                    continue
                try:
                    yield worse, self._pair(parent, better, worse)
                except BadRowError as error:
                    yield worse, error

    def _rank(self, key: str) -> float | None:
        rank = self.found[key].get("rank")
        if not isinstance(rank, int | float) or self.found[key].get("deleted"):
            return None
        with contextlib.suppress(OverflowError):  # An integer of hundreds of digits.
            return float(rank) if math.isfinite(rank) else None
        return None

    def _pair(self, parent: str, better: str, worse: str) -> Fields:
        chosen, rejected = self.found[better].get("text"), self.found[worse].get("text")
        return {**self.found[worse], "prompt": self._path(parent), "chosen": chosen, "rejected": rejected}

    def _path(self, key: Any) -> list[Message]:
        """The messages from the root of a tree to one of its messages."""
        path: list[Message] = []
        while key is not None:
            if not isinstance(key, str) or key not in self.found:
                raise BadRowError(f"the file has no message {str(key)[:40]!r}, which is replied to")
            if len(path) == len(self.found):
                raise BadRowError("the message replies to itself")
            fields = self.found[key]
            role = fields.get("role")
            if not isinstance(role, str) or role not in _ROLES:
                raise BadRowError(f"role is not known: {str(role)[:40]!r}")
            path.append({"role": _ROLES[role], "content": fields.get("text")})  # type: ignore[dict-item]
            key = fields["parent_id"]
        return path[::-1]


def _gathered(rows: Rows) -> Rows:
    """Pairs from messages that are rows."""
    tree, places = _Tree(), {}
    for place, fields in rows:
        if not isinstance(fields, Mapping):
            yield place, fields
            continue
        key = fields.get("message_id")
        if not isinstance(key, str) or key in tree.found:
            reason = "the same message_id twice" if isinstance(key, str) else "message_id is not text"
            yield place, Rejection(reason, place)
            continue
        places[key] = place
        tree.add(key, fields.get("parent_id"), fields)
    for key, pair in tree.pairs():
        place = places[key]
        if isinstance(pair, Skip):
            yield place, Skipped(pair.reason, place)
        else:
            yield place, Rejection(str(pair), place) if isinstance(pair, BadRowError) else pair


def _trees(data: DataConfig, fields: Fields) -> Examples:
    root = present(fields, "prompt")
    tree = _Tree()
    waiting: list[tuple[str | None, Any]] = [(None, root)]
    for number in itertools.count():
        if not waiting:
            break
        parent, message = waiting.pop()
        if not isinstance(message, Mapping):
            raise BadRowError(f"a message of the tree is not an object but {type(message).__name__}")
        replies = message.get("replies") or []
        if not isinstance(replies, list):
            raise BadRowError(f"replies is not a list but {type(replies).__name__}")
        tree.add(str(number), parent, message)
        waiting += [(str(number), reply) for reply in reversed(replies)]
    found: Examples = []
    for _, pair in tree.pairs():
        if isinstance(pair, BadRowError):
            raise pair
        found.append(pair if isinstance(pair, Skip) else (pair, _NAMES))
    return found or [Skip("a tree without replies")]


TREES = {
    "oasst": Layout(
        {"pairs": ("message_id", "parent_id", "text", "role", "rank")},
        named("prompt", "chosen", "rejected"),
        _gathered,
        fits=lambda fields: isinstance(fields.get("message_id"), str) and "parent_id" in fields and "text" in fields,
    ),
    "oasst_trees": Layout({"pairs": ("prompt",)}, by_row(_trees), fits=has("message_tree_id", "prompt.replies")),
}
"""See the text at the top of this file."""
