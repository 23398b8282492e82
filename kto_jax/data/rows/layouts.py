"""Which columns of a row hold its prompt, completions and feedback: one entry of `LAYOUTS` for each layout.

    fields          the columns that `data.*_field` name
    messages        a chat log: messages, of which any of the assistant's may have a field "feedback";
                    or with a rating of the last one beside them
    sharegpt        conversations of messages with "from" and "value", rated beside them by the label field or kto_tag
    alpaca          instruction, input, output, system, history; the label field or kto_tag
    halos           the four shapes of the JSON files of the HALOs code, told apart by their field "type"
    hh              Anthropic HH-RLHF: chosen and rejected, two whole transcripts
    shp             Stanford Human Preferences: history, human_ref_A, human_ref_B, labels
    oasst           OpenAssistant messages: message_id, parent_id, role, text, rank
    ultrafeedback   UltraFeedback, binarized: prompt, chosen and rejected with the prompt repeated
    kto_mix         kto-mix: prompt, completion, label

A layout reads a row as one or more examples, each a mapping and which of its names hold what.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.files import Rejection
from kto_jax.data.rows.turns import BadRowError, Message, decoded, present

Fields = Mapping[str, Any]
Names = dict[str, str]
"""From prompt, completion, label, score, chosen, rejected and weight to a column; the weight may be absent, and so may
the prompt of a pair."""
Examples = list[tuple[Fields, Names]]
Rows = Iterator[tuple[str, Any]]

NEEDED = {
    "thumbs": ("completion", "label"),
    "pairs": ("chosen", "rejected"),
    "scores": ("completion", "score"),
    "demonstrations": ("completion",),
}
"""What an example of each `data.format` holds beside its prompt."""
_HALOS_TYPES = {
    "demonstrations": "sample",
    "thumbs": "binary_feedback",
    "pairs": "pairwise_feedback",
    "scores": "scalar_feedback",
}
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a file are read.

    Attributes:
      columns: for each `data.format` that the layout can hold, the columns that its rows must have.
      reader: makes, once for a file, the function that gives the examples of a row. That raises `BadRowError`.
      gather: makes rows of examples from all rows of a file, where one row alone is no example.
    """

    columns: Mapping[str, tuple[str, ...]]
    reader: Callable[[DataConfig], Callable[[Fields], Examples]]
    gather: Callable[[Rows], Rows] | None = None


def _fields(data: DataConfig) -> Callable[[Fields], Examples]:
    names = {key: getattr(data, f"{key}_field") for key in ("prompt", *NEEDED[data.format])}
    return lambda fields: [(fields, names)]


def _named(*keys: str) -> Callable[[DataConfig], Callable[[Fields], Examples]]:
    """The columns have the names of what they hold."""
    names = {key: key for key in keys}
    return lambda data: lambda fields: [(fields, names)]


def _by_row(read: Callable[[DataConfig, Fields], Examples]) -> Callable[[DataConfig], Callable[[Fields], Examples]]:
    """Every row says for itself which of its columns hold what."""
    return lambda data: functools.partial(read, data)


def _messages(data: DataConfig, fields: Fields) -> Examples:
    """Each rated turn is an example, whose prompt is all turns before it; the others are only context."""
    messages = decoded(present(fields, "messages"))
    if not isinstance(messages, list):
        raise BadRowError(f"messages is not a list but {type(messages).__name__}")
    kind = "label" if data.format == "thumbs" else "score"
    examples: Examples = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRowError(f"message {i + 1} is not an object but {type(message).__name__}")
        rating = message.get("feedback")
        if rating is None:
            rating = message.get(getattr(data, f"{kind}_field"))
        if rating is None:
            continue
        if message.get("role") != "assistant":
            raise BadRowError(f"feedback on message {i + 1}, which is not the assistant's")
        weight = message.get(data.weight_field)
        weight = fields.get(data.weight_field) if weight is None else weight
        example = {"prompt": messages[:i], "completion": [message], kind: rating, "weight": weight}
        names = {key: key for key in example}
        examples.append(({data.tools_field: fields.get(data.tools_field), **example}, names))
    rating = fields.get(getattr(data, f"{kind}_field"))
    if examples or rating is None:
        return examples
    # One rating beside the messages is of the last turn.
    example = {"prompt": messages[:-1], "completion": messages[-1:], kind: rating}
    return [({**fields, **example}, {key: key for key in example})]


def _sharegpt(data: DataConfig, fields: Fields) -> Examples:
    """Messages with "from" and "value"; the rating of the last stands beside them, in the label field or kto_tag."""
    turns = decoded(present(fields, "conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRowError("conversations is not a list of objects")
    messages = []
    for turn in turns:
        speaker = str(turn.get("from", turn.get("role")))
        content = turn.get("value", turn.get("content"))
        messages.append({**turn, "role": _SHAREGPT_ROLES.get(speaker, speaker), "content": content})
    return _messages(data, {**_with_tag(data, fields), "messages": messages})


def _alpaca(data: DataConfig, fields: Fields) -> Examples:
    """Instruction and input are the question; system and history, pairs of a question and an answer, come before it."""
    question = present(fields, "instruction")
    if fields.get("input"):
        question = f"{question}\n{fields['input']}"
    turns = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRowError("history is not a list of pairs of a question and an answer")
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    prompt = [*turns, {"role": "user", "content": question}]
    names = {"prompt": "prompt", "completion": "output"}
    if data.format == "thumbs":
        names["label"] = data.label_field
    return [({**_with_tag(data, fields), "prompt": prompt}, names)]


def _with_tag(data: DataConfig, fields: Fields) -> dict[str, Any]:
    """The fields, with LLaMA-Factory's kto_tag as the label if there is no other."""
    tagged = dict(fields)
    if data.label_field not in fields and "kto_tag" in fields:
        tagged[data.label_field] = fields["kto_tag"]
    return tagged


def _halos(data: DataConfig, fields: Fields) -> Examples:
    expected, found = _HALOS_TYPES[data.format], present(fields, "type")
    if found != expected:
        raise BadRowError(f"type is {str(found)[:40]!r}, and data.format {data.format!r} reads {expected!r}")
    names = {"prompt": "prompt" if "prompt" in fields else "instruction", "completion": "output"}
    if data.format == "pairs":
        first, second = ("output_A", "output_B") if _zero_or_one(fields, "label") else ("output_B", "output_A")
        return [(fields, {"prompt": names["prompt"], "chosen": first, "rejected": second})]
    if data.format == "scores":
        names["score"] = "reward"
    if data.format == "thumbs":
        names["label"] = "label"
        fields = {**fields, "label": _zero_or_one(fields, "label")}
    return [(fields, names)]


def _shp(data: DataConfig, fields: Fields) -> Examples:
    sides = ("human_ref_A", "human_ref_B") if _zero_or_one(fields, "labels") else ("human_ref_B", "human_ref_A")
    return [(fields, {"prompt": "history", "chosen": sides[0], "rejected": sides[1]})]


def _zero_or_one(fields: Fields, name: str) -> bool:
    value = present(fields, name)
    if isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    raise BadRowError(f"{name} is not 0 or 1: {str(value)[:40]!r}")


def _oasst(rows: Rows) -> Rows:
    """Pairs of replies to one message: each reply is preferred to the next in rank. Holds a whole file in memory."""
    found: dict[str, tuple[str, Fields]] = {}
    replies: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for place, fields in rows:
        if isinstance(fields, Rejection):
            yield place, fields
            continue
        key, parent, rank = (fields.get(name) for name in ("message_id", "parent_id", "rank"))
        if not isinstance(key, str) or key in found:
            reason = "the same message_id twice" if isinstance(key, str) else "message_id is not text"
            yield place, Rejection(reason, place)
            continue
        found[key] = place, fields
        is_ranked = isinstance(rank, int | float) and math.isfinite(rank)
        if is_ranked and isinstance(parent, str) and fields.get("role") == "assistant":
            replies[parent].append((float(rank), key))
    for parent, ranked in replies.items():
        ranked.sort()
        for (better_rank, better), (rank, worse) in itertools.pairwise(ranked):
            place, fields = found[worse]
            if better_rank == rank:
                continue
            try:
                prompt = _path(parent, found)
            except BadRowError as error:
                yield place, Rejection(str(error), place)
                continue
            chosen = found[better][1].get("text")
            yield place, {**fields, "prompt": prompt, "chosen": chosen, "rejected": fields.get("text")}


def _path(key: Any, found: dict[str, tuple[str, Fields]]) -> list[Message]:
    """The messages from the root of a tree to one of its messages."""
    path: list[Message] = []
    while key is not None:
        if not isinstance(key, str) or key not in found:
            raise BadRowError(f"the file has no message {str(key)[:40]!r}, which is replied to")
        if len(path) == len(found):
            raise BadRowError("the message replies to itself")
        fields = found[key][1]
        role = fields.get("role")
        if not isinstance(role, str) or role not in _OASST_ROLES:
            raise BadRowError(f"role is not known: {str(role)[:40]!r}")
        path.append({"role": _OASST_ROLES[role], "content": fields.get("text")})  # type: ignore[dict-item]
        key = fields.get("parent_id")
    return path[::-1]


LAYOUTS = {
    "fields": Layout(dict.fromkeys(NEEDED, ()), _fields),
    "messages": Layout(dict.fromkeys(("thumbs", "scores"), ("messages",)), _by_row(_messages)),
    "sharegpt": Layout(dict.fromkeys(("thumbs", "scores"), ("conversations",)), _by_row(_sharegpt)),
    "alpaca": Layout(
        {"thumbs": ("instruction", "output"), "demonstrations": ("instruction", "output")}, _by_row(_alpaca)
    ),
    "halos": Layout(
        {
            "demonstrations": ("type", "output"),
            "thumbs": ("type", "prompt", "output", "label"),
            "pairs": ("type", "prompt", "output_A", "output_B", "label"),
            "scores": ("type", "prompt", "output", "reward"),
        },
        _by_row(_halos),
    ),
    "hh": Layout({"pairs": ("chosen", "rejected")}, _named("chosen", "rejected")),
    "shp": Layout({"pairs": ("history", "human_ref_A", "human_ref_B", "labels")}, _by_row(_shp)),
    "oasst": Layout(
        {"pairs": ("message_id", "parent_id", "text", "role", "rank")}, _named("prompt", "chosen", "rejected"), _oasst
    ),
    "ultrafeedback": Layout({"pairs": ("prompt", "chosen", "rejected")}, _named("prompt", "chosen", "rejected")),
    "kto_mix": Layout({"thumbs": ("prompt", "completion", "label")}, _named("prompt", "completion", "label")),
}
