"""Layouts of training files: chat logs, ShareGPT, alpaca, OpenAI's and TRL's.

messages    turns, of which any of the assistant's may have a field "feedback", or with a rating of the last beside
            them; as demonstrations, each turn of the assistant's, or the last
sharegpt    conversations of turns with "from" and "value", rated beside them by the label field or kto_tag
alpaca      instruction, input, output, system, history; the label field or kto_tag
openai      OpenAI's files for fine-tuning (messages) and preferences (input, preferred_output, non_preferred_output)
trl         TRL's dataset types: prompt, completion, chosen, rejected, messages; a prompt may be implicit
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.layout import Examples, Fields, Layout, Names, Skip, by_row, example, has, rating_names
from kto_jax.data.rows.message_forms import conversation_in, decoded
from kto_jax.data.rows.threads import said_before
from kto_jax.data.rows.turns import BadRowError, check_role, described, lookup, present

_UNRATED = "no message has feedback"
_NOT_TRAINED = ("train", "train_on_turn", "loss")
"""Keys by which a turn is only context where they are false: axolotl's and ms-swift's."""
_FORMATS = ("thumbs", "scores", "demonstrations")


def conversation(messages: Any, data: DataConfig, name: str) -> list[Any]:
    """Messages as a list of objects in one form.

    Raises:
      BadRowError: they are not.
    """
    messages = decoded(messages, data.roles)
    if not isinstance(messages, list):
        raise BadRowError(f"{name} is not a list but {described(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRowError(f"message {i + 1} is not an object but {described(message)}")
    return messages


def _messages(data: DataConfig, fields: Fields, name: str = "messages") -> Examples:
    """Each rated turn is an example, whose prompt is all turns before it; the others are only context."""
    if name not in fields and fields.get("contents"):
        name = "contents"  # Gemini's, with systemInstruction beside it.
        fields = {**fields, name: conversation_in(fields)}
    messages = conversation(present(fields, name), data, name)
    if data.format == "demonstrations":
        return _demonstrations(messages, data, fields)
    kind, ratings = "label" if data.format == "thumbs" else "score", rating_names(data)
    found: Examples = []
    for i, message in enumerate(messages):
        rating = _rating_of(message, ratings)
        if rating is None:
            continue
        if check_role(message.get("role"), f"message {i + 1}") != "assistant":
            raise BadRowError(f"feedback on message {i + 1}, which is not the assistant's")
        weight = message.get(data.weight_field)
        weight = fields.get(data.weight_field) if weight is None else weight
        found.append(example(fields, said_before(messages, i), [message], **{kind: rating}, weight=weight))
    if found:
        return found
    if all(lookup(fields, key) in (None, "") for key in ratings):
        return [Skip(_UNRATED)]
    # One rating beside the messages is of the last turn.
    held, names = example(fields, said_before(messages, len(messages) - 1), messages[-1:])
    return [(held, names | {kind: rating_field(data)})]


_RATED = ("rating", "value", "score", "thumb", "thumbs", "vote")
"""Keys of the rating in feedback that is an object, beside a comment or a time."""


def _rating_of(message: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The feedback on a message, or None."""
    rating = message.get("feedback")
    if rating is None:
        rating = next((found for name in names if (found := lookup(message, name)) is not None), None)
    if not isinstance(rating, Mapping):
        return rating
    given = [rating[key] for key in _RATED if rating.get(key) is not None]
    return given[0] if len(given) == 1 else rating or None


def rating_field(data: DataConfig) -> Any:
    """The name, or names, of the column with the label or score."""
    return data.label_field if data.format == "thumbs" else data.score_field


def _demonstrations(messages: list[Any], data: DataConfig, fields: Fields) -> Examples:
    """The assistant's turns, each after all turns before it. A turn of weight 0 is only context, as at OpenAI."""
    spoken = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not spoken:
        raise BadRowError("no message is the assistant's")
    turns = spoken if data.assistant_turns == "all" else spoken[-1:]
    found: Examples = []
    for i in turns:
        weight, before = messages[i].get(data.weight_field), said_before(messages, i)
        if all(message.get("role") in ("system", "developer") for message in before):
            found.append(Skip("a turn of the assistant's before any of the user's"))
        elif weight is not None and weight == 0:
            found.append(Skip("a turn of weight 0"))
        elif left := next((key for key in _NOT_TRAINED if messages[i].get(key) is False), None):
            found.append(Skip(f"a turn whose {left!r} is false"))
        else:
            weight = fields.get(data.weight_field) if weight is None else weight
            found.append(example(fields, before, [messages[i]], weight=weight))
    return found


def _sharegpt(data: DataConfig, fields: Fields) -> Examples:
    return _messages(data, with_tag(data, fields), "conversations")


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
    names: Names = {"prompt": "prompt", "completion": "output"}
    if data.format == "thumbs":
        names["label"] = rating_field(data)
    return [({**with_tag(data, fields), "prompt": [*turns, {"role": "user", "content": question}]}, names)]


def with_tag(data: DataConfig, fields: Fields) -> Fields:
    """The fields, with LLaMA-Factory's kto_tag as the label if there is no other."""
    (name, *others) = rating_names(data)
    if others or data.format != "thumbs" or "kto_tag" not in fields or lookup(fields, name) is not None:
        return fields
    return {**fields, name: fields["kto_tag"]}


def _openai(data: DataConfig, fields: Fields) -> Examples:
    if data.format == "demonstrations":
        return _messages(data, fields)
    messages = conversation(present(fields, "input.messages"), data, "input.messages")
    held = {**fields, "prompt": messages, data.tools_field: lookup(fields, "input.tools")}
    return [(held, {"prompt": "prompt", "chosen": "preferred_output", "rejected": "non_preferred_output"})]


def _trl(data: DataConfig, fields: Fields) -> Examples:
    if data.format == "demonstrations" and "messages" in fields:
        return _messages(data, fields)
    keys = {"pairs": ("prompt", "chosen", "rejected"), "thumbs": ("prompt", "completion", "label")}
    names = {key: key for key in keys.get(data.format, ("prompt", "completion"))}
    if data.format == "pairs" and fields.get("prompt") is None:
        fields = _with_implicit_prompt(fields)
    return [(fields, names)]


def _with_implicit_prompt(fields: Fields) -> Fields:
    """Splits two texts before the first word that differs: what they share is the prompt."""
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str) or chosen.lstrip().startswith("Human:"):
        return fields
    pairs = zip(chosen, rejected, strict=False)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    cut = next((i for i in range(same, 0, -1) if chosen[:i][-1:].isspace() and not chosen[i : i + 1].isspace()), 0)
    cut = len(chosen[:cut].rstrip())
    return {**fields, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _has_turns(name: str, *speakers: str) -> Any:
    """Whether a column holds turns, recognised by the key of their speaker."""

    def fits(fields: Fields) -> bool:
        turns = decoded(fields.get(name))
        first = turns[0] if isinstance(turns, list) and turns else None
        return isinstance(first, Mapping) and any(speaker in first for speaker in speakers)

    return fits


_HALOS = ("sample", "binary_feedback", "pairwise_feedback", "scalar_feedback")

CHATS = {
    "messages": Layout(
        dict.fromkeys(_FORMATS, (("messages", "contents"),)),
        by_row(_messages),
        fits=lambda fields: _has_turns("messages", "role", "from")(fields) or _has_turns("contents", "role")(fields),
    ),
    "sharegpt": Layout(
        dict.fromkeys(_FORMATS, ("conversations",)), by_row(_sharegpt), fits=_has_turns("conversations", "from", "role")
    ),
    "alpaca": Layout(
        {"thumbs": ("instruction", "output"), "demonstrations": ("instruction", "output")},
        by_row(_alpaca),
        fits=lambda fields: has("instruction", "output")(fields) and fields.get("type") not in _HALOS,
    ),
    "openai": Layout(
        {"demonstrations": ("messages",), "pairs": ("input", "preferred_output", "non_preferred_output")},
        by_row(_openai),
        fits=has("input.messages", "preferred_output", "non_preferred_output"),
    ),
    "trl": Layout(
        {
            "thumbs": ("prompt", "completion", "label"),
            "pairs": ("chosen", "rejected"),
            "demonstrations": (),
        },
        by_row(_trl),
    ),
}
"""See the text at the top of this file."""
