"""Layouts of feedback exported by chat programs and observability tools.

    open_webui      feedbacks: data.rating, and the chat in snapshot, a tree that leads to meta.message_id;
                    or chats: each answer of the tree with its annotation.rating
    librechat       conversations: messages with isCreatedByUser, parentMessageId and feedback.rating
    anythingllm     workspace chats: prompt, response, rating GOOD or BAD
    gradio          flagged answers: conversation, index of the answer, value Like or Dislike
    langfuse        traces or observations: input, output and scores
    langsmith       runs: inputs, outputs and feedback_stats, or feedback
    argilla         records: fields and the annotators' responses, nested or as columns "question.responses"

If an export has several ratings of one answer, `data.label_field` (or `data.score_field`) names one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.layout import Examples, Fields, Layout, Rows, Skip, by_row, example, has, rating_names
from kto_jax.data.rows.logged import from_json, messages_of, with_thoughts
from kto_jax.data.rows.message_forms import decoded
from kto_jax.data.rows.turns import BadRowError, lookup, present

_UNRATED = "an answer without a rating"
_THUMBS = {"1": True, "1.0": True, "-1": False, "-1.0": False, "0": False, "0.0": False}
_KINDS = {"thumbs": "label", "scores": "score", "demonstrations": "unrated"}
_USUAL = ("label", "score")
"""Names of the rating that nobody has set."""


# ------------------------------------------------------------------------------------------------------- chat programs


def _path_to(key: Any, messages: Mapping[str, Any], parent_of: str) -> list[Any]:
    """The messages from the root of a tree to one of them."""
    path: list[Any] = []
    while isinstance(key, str) and isinstance(messages.get(key), Mapping):
        if len(path) == len(messages):
            raise BadRowError("the message replies to itself")
        path.append(messages[key])
        key = messages[key].get(parent_of)
    return path[::-1]


def _system(text: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _open_webui(data: DataConfig, fields: Fields) -> Examples:
    if "snapshot" not in fields and "chat" in fields:
        return _open_webui_chat(data, fields)
    if fields.get("type", "rating") != "rating":
        return [Skip(f"feedback of type {str(fields['type'])[:40]!r}")]
    chat, key = lookup(fields, "snapshot.chat.chat"), lookup(fields, "meta.message_id")
    messages = lookup(chat, "history.messages")
    said = _path_to(key, messages, "parentId") if isinstance(messages, Mapping) else []
    if not said:
        raise BadRowError("the snapshot has no message meta.message_id")
    rating = lookup(fields, "data.rating" if data.format == "thumbs" else "data.details.rating")
    return _webui_answer(data, fields, chat, said, rating)


def _open_webui_chat(data: DataConfig, fields: Fields) -> Examples:
    """The answers of an exported chat, whose ratings are in annotations."""
    chat = present(fields, "chat")
    messages = lookup(chat, "history.messages")
    if not isinstance(messages, Mapping):
        raise BadRowError("the chat has no history.messages")
    name = "annotation.rating" if data.format == "thumbs" else "annotation.details.rating"
    examples: Examples = []
    for key, message in messages.items():
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            said = _path_to(key, messages, "parentId")
            examples += _webui_answer(data, fields, chat, said, lookup(message, name))
    return examples or [Skip("a conversation without an answer")]


def _webui_answer(data: DataConfig, fields: Fields, chat: Any, said: list[Any], rating: Any) -> Examples:
    """The last message of a path, with its rating."""
    if rating is None or rating == "":
        return [Skip(_UNRATED)]
    if any(message.get("files") for message in said):
        raise BadRowError("a message has files, which the export does not hold")
    if used := next((name for name in ("sources", "citations") if said[-1].get(name)), None):
        raise BadRowError(f"the answer has {used!r}, whose text the model read and the export does not hold")
    turns = [with_thoughts(message) for message in said]
    prompt = [*_system(lookup(chat, "params.system") or lookup(chat, "system")), *turns[:-1]]
    return _rated(data, fields, prompt, turns[-1], rating)


def _librechat(data: DataConfig, fields: Fields) -> Examples:
    found: dict[str, Any] = {}
    waiting = present(fields, "messages")
    if not isinstance(waiting, list):
        raise BadRowError(f"messages is not a list but {type(waiting).__name__}")
    while waiting:
        inner: list[Any] = []
        for message in waiting:
            if not isinstance(message, Mapping) or not isinstance(message.get("messageId"), str):
                raise BadRowError("a message has no messageId")
            found[message["messageId"]] = message
            children = message.get("children")
            inner += children if isinstance(children, list) else []
        waiting = inner
    system = _system(lookup(fields, "options.promptPrefix"))
    examples: Examples = []
    for key, message in found.items():
        if message.get("isCreatedByUser") is not False or fields.get("messageId", key) != key:
            continue
        turns = [_librechat_turn(each) for each in _path_to(key, found, "parentMessageId")]
        rating = lookup(message, "feedback.rating")
        examples += _rated(data, fields, [*system, *turns[:-1]], turns[-1], rating)
    return examples or [Skip("a conversation without an answer")]


def _librechat_rows(rows: Rows) -> Rows:
    """Conversations; of a dump of one message a row, each answer with the messages of its conversation."""
    messages: dict[Any, list[Any]] = defaultdict(list)
    answers: list[tuple[str, Any]] = []
    for place, fields in rows:
        if not isinstance(fields, Mapping) or "messageId" not in fields or "messages" in fields:
            yield place, fields
            continue
        key = str(fields.get("conversationId"))
        messages[key].append(fields)
        if fields.get("isCreatedByUser") is False:
            answers.append((place, fields))
    for place, fields in answers:
        inside = messages[str(fields.get("conversationId"))]
        yield place, {"messageId": fields["messageId"], "messages": inside}


def _librechat_turn(message: Fields) -> dict[str, Any]:
    """A message in OpenAI's form: its text is in `text`, or in parts, of which some are thoughts."""
    if message.get("files"):
        raise BadRowError("a message has files, which the export does not hold")
    role = "user" if message.get("isCreatedByUser") else "assistant"
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        return {"role": role, "content": message.get("text")}
    turn: dict[str, Any] = {"role": role, "content": []}
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "think" and role == "assistant":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + str(part.get("think", ""))
        elif kind == "text" and isinstance(part.get("text"), Mapping):
            turn["content"].append({"type": "text", "text": part["text"].get("value")})
        else:
            turn["content"].append(part)
    return turn


def _rated(data: DataConfig, fields: Fields, prompt: Any, completion: Any, rating: Any) -> Examples:
    """One answer with its rating, or a skip if it has none."""
    if rating is None or rating == "":
        return [Skip(_UNRATED)]
    return [example(fields, prompt, [completion], **{_KINDS[data.format]: rating})]


def _anythingllm(data: DataConfig, fields: Fields) -> Examples:
    if fields.get("attachments"):
        raise BadRowError("the chat has attachments, which are not text")
    return [example(fields, present(fields, "prompt"), fields.get("response"), label=fields.get("rating"))]


def _gradio(data: DataConfig, fields: Fields) -> Examples:
    """The answer that was flagged, which need not be the last: `index` is its number, or a pair of numbers."""
    said, at = decoded(from_json(present(fields, "conversation"))), from_json(str(present(fields, "index")))
    if isinstance(said, list) and said and all(isinstance(pair, list) and len(pair) == 2 for pair in said):
        roles = [(("user", one), ("assistant", other)) for one, other in said]
        said = [{"role": role, "content": text} for pair in roles for role, text in pair]
        at = 2 * at[0] + at[1] if isinstance(at, list) and list(map(type, at)) == [int, int] else None
    number = int(at) if str(at).isdecimal() else -1
    are_messages = isinstance(said, list) and all(isinstance(each, Mapping) for each in said)
    if not are_messages or not 0 <= number < len(said):
        raise BadRowError(f"index {str(fields['index'])[:20]!r} is no message of the conversation")
    if title := next((lookup(each, "metadata.title") for each in said if lookup(each, "metadata.title")), None):
        raise BadRowError(f"the conversation displays {str(title)[:40]!r}, which is not what the model wrote")
    return [example(fields, said[:number], [said[number]], label=fields.get("value"))]


# -------------------------------------------------------------------------------------------------- observers of models


def _logged(ratings: Callable[[Fields], Any], asked: str, answered: str) -> Callable[[DataConfig, Fields], Examples]:
    """A reader of logged calls: input, output, and ratings by name."""

    def read(data: DataConfig, fields: Fields) -> Examples:
        rating = None if data.format == "demonstrations" else _chosen_rating(ratings(fields), data, fields)
        if isinstance(rating, Skip):
            return [rating]
        prompt, completion = messages_of(fields.get(asked)), messages_of(fields.get(answered))
        if prompt is None or completion is None:
            name = asked if prompt is None else answered
            raise BadRowError(
                f"{name} holds neither text nor messages; data.layout='fields' reads a dotted path into it"
            )
        tools = lookup(fields.get(asked), "tools")
        fields = {data.tools_field: tools, **fields} if tools else fields
        completion = [completion] if isinstance(completion, str) else completion
        last = (
            completion[-1] if isinstance(completion[-1], Mapping) else {"role": "assistant", "content": completion[-1]}
        )
        return [example(fields, prompt, [with_thoughts(last)], **{_KINDS[data.format]: rating})]

    return read


def _chosen_rating(ratings: Mapping[str, Any], data: DataConfig, fields: Fields) -> Any:
    """The rating that the settings name, or the only one."""
    ratings = {name: value for name, value in ratings.items() if value is not None and value != []}
    for name in rating_names(data):
        value = ratings.get(name, lookup(fields, name) if name not in _USUAL else None)
        if value is not None and value != []:
            return _only(value)
    if not set(rating_names(data)) <= set(_USUAL) or not ratings:
        return Skip(_UNRATED)
    if len(ratings) > 1:
        field = "label_field" if data.format == "thumbs" else "score_field"
        raise BadRowError(f"several ratings, {', '.join(sorted(map(repr, ratings)))[:80]}: data.{field} names one")
    return _only(next(iter(ratings.values())))


def _only(value: Any) -> Any:
    """The value of several ratings that agree; a skip if they differ."""
    values = value if isinstance(value, list) else [value]
    return values[0] if all(each == values[0] for each in values) else Skip("ratings that disagree")


def _langfuse_scores(fields: Fields) -> dict[str, Any]:
    """Scores by their names: from a list of objects, or of an export's columns with lists."""
    scores = from_json(fields.get("scores"))
    if isinstance(scores, Mapping):
        return {str(name): value for name, value in scores.items() if value is not None}
    found: dict[str, Any] = {}
    for score in scores if isinstance(scores, list) else ():
        if isinstance(score, Mapping) and "name" in score:
            value = score.get("value")
            value = score.get("stringValue", score.get("string_value")) if value is None else value
            if value is not None:
                found.setdefault(str(score["name"]), []).append(value)
    return found


def _langsmith_feedback(fields: Fields) -> dict[str, Any]:
    """Ratings by their keys: of feedback_stats, the mean where all agree; or of a list of feedback."""
    found: dict[str, Any] = {}
    stats = fields.get("feedback_stats")
    for name, figures in stats.items() if isinstance(stats, Mapping) else ():
        if isinstance(figures, Mapping) and figures.get("n", 1) and figures.get("avg") is not None:
            found[str(name)] = figures["avg"]
    feedback = fields.get("feedback")
    for each in feedback if isinstance(feedback, list) else ():
        if isinstance(each, Mapping) and (rating := each.get("score", each.get("value"))) is not None:
            found.setdefault(str(each.get("key")), []).append(rating)
    return found


def _argilla_responses(fields: Fields) -> dict[str, list[Any]]:
    """The submitted responses to each question: Argilla 2's records and columns, and those of Argilla 1."""
    found: dict[str, list[Any]] = {}
    responses = fields.get("responses")
    if isinstance(responses, Mapping):
        for name, given in responses.items():
            found[str(name)] = _submitted(given)
    for each in responses if isinstance(responses, list) else ():
        if isinstance(each, Mapping) and isinstance(each.get("values"), Mapping):
            for name, value in each["values"].items():
                if each.get("status", "submitted") == "submitted":
                    found.setdefault(str(name), []).append(lookup(value, "value"))
    for name, values in fields.items():
        if str(name).endswith(".responses") and isinstance(values, list):
            statuses = fields.get(f"{name}.status")
            statuses = statuses if isinstance(statuses, list) else ["submitted"] * len(values)
            kept = [value for value, status in zip(values, statuses, strict=False) if status == "submitted"]
            found[str(name).removesuffix(".responses")] = kept
        elif (
            isinstance(values, list)
            and values
            and all(has("value", "status")(v) for v in values if isinstance(v, Mapping))
        ):
            found[str(name)] = _submitted(values)
    return {name: values for name, values in found.items() if values}


def _submitted(given: Any) -> list[Any]:
    each = [one for one in given if isinstance(one, Mapping)] if isinstance(given, list) else []
    return [one.get("value") for one in each if one.get("status", "submitted") == "submitted"]


_ASKED, _ANSWERED = (
    ("prompt", "instruction", "question", "input", "chat", "messages"),
    (*("completion", "response", "answer", "output", "generation"),),
)


def _argilla(data: DataConfig, fields: Fields) -> Examples:
    held = fields["fields"] if isinstance(fields.get("fields"), Mapping) else fields
    rating = _chosen_rating(_argilla_responses(fields), data, fields)
    if isinstance(rating, Skip):
        return [rating]
    prompt, completion = _one_of(held, data.prompt_field, _ASKED), _one_of(held, data.completion_field, _ANSWERED)
    return [example(fields, prompt, completion, **{_KINDS[data.format]: rating})]


def _one_of(fields: Fields, name: str, usual: tuple[str, ...]) -> Any:
    """The field of that name, or the only one of the usual names.

    Raises:
      BadRowError: none is there, or several are.
    """
    if fields.get(name) is not None:
        return fields[name]
    found = [each for each in usual if fields.get(each) is not None]
    if len(found) != 1:
        names = ", ".join(sorted(map(repr, map(str, fields))))[:80]
        raise BadRowError(f"{len(found)} fields for the {usual[0]} among {names}: data.{usual[0]}_field names one")
    return fields[found[0]]


def _is_argilla(fields: Fields) -> bool:
    nested = isinstance(fields.get("fields"), Mapping) and isinstance(fields.get("responses"), Mapping | list)
    return nested or any(str(name).endswith((".responses", ".responses.status")) for name in fields)


_BOTH = ("thumbs", "scores")
EXPORTS = {
    "open_webui": Layout(
        dict.fromkeys(_BOTH, (("snapshot", "chat"),)),
        by_row(_open_webui),
        fits=lambda fields: (
            (isinstance(lookup(fields, "data"), Mapping) and has("snapshot.chat")(fields))
            or has("chat.history.messages")(fields)
        ),
        labels=_THUMBS,
    ),
    "librechat": Layout(
        {"thumbs": (("messages", "messageId"),)},
        by_row(_librechat),
        _librechat_rows,
        fits=lambda fields: (
            has("messages.0.messageId")(fields) or ("messageId" in fields and "isCreatedByUser" in fields)
        ),
        labels={"thumbsUp": True, "thumbsDown": False},
    ),
    "anythingllm": Layout(
        {"thumbs": ("prompt", "response", "rating")},
        by_row(_anythingllm),
        fits=lambda fields: (
            has("prompt", "response", "rating")(fields) and ("workspace" in fields or "sent_at" in fields)
        ),
        labels={"GOOD": True, "BAD": False, "--": None},
    ),
    "gradio": Layout(
        {"thumbs": ("conversation", "index", "value")},
        by_row(_gradio),
        fits=has("conversation", "index", "value"),
        labels={"Like": True, "Dislike": False},
    ),
    "langfuse": Layout(
        dict.fromkeys((*_BOTH, "demonstrations"), ("input", "output")),
        by_row(_logged(_langfuse_scores, "input", "output")),
        fits=lambda fields: (
            "input" in fields
            and "output" in fields
            and any(
                name in fields for name in ("scores", "projectId", "project_id", "traceId", "trace_id", "observations")
            )
        ),
        labels=_THUMBS,
    ),
    "langsmith": Layout(
        dict.fromkeys((*_BOTH, "demonstrations"), ("inputs", "outputs")),
        by_row(_logged(_langsmith_feedback, "inputs", "outputs")),
        fits=lambda fields: "inputs" in fields and "outputs" in fields,
        labels=_THUMBS,
    ),
    "argilla": Layout(dict.fromkeys(_BOTH, ()), by_row(_argilla), fits=_is_argilla, labels=_THUMBS),
}
"""See the text at the top of this file."""
