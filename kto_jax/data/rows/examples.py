"""From an example, the fields of a row and which of them hold what, to a record: a `Feedback` or a `Preference`.

No label is guessed: it is a boolean or mapped by `data.label_map`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import string
from typing import Any

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.layout import NEEDED, Fields, Names, Skip
from kto_jax.data.rows.message_forms import decoded, text_of
from kto_jax.data.rows.rejection import Rejection, Skipped
from kto_jax.data.rows.sampled import SampledTokens, sampled_tokens
from kto_jax.data.rows.turns import (
    SAME_COMPLETIONS,
    TOOLS,
    BadRowError,
    Completion,
    Message,
    check_text,
    described,
    lookup,
    message_of,
    part,
    present,
    turns_of_transcript,
    with_tools,
)

_REPLIES = {name: tuple(key for key in keys if key not in ("label", "score")) for name, keys in NEEDED.items()}
_USUAL_LABELS = (
    *(("1", "0"), ("1", "-1"), ("1.0", "0.0"), ("1.0", "-1.0")),
    *(("True", "False"), ("true", "false"), ("TRUE", "FALSE"), ("yes", "no"), ("up", "down"), ("good", "bad")),
    *(("thumbs_up", "thumbs_down"), ("thumbsUp", "thumbsDown"), ("+1", "-1"), ("👍", "👎"), ("like", "dislike")),
    *(("accept", "reject"), ("positive", "negative"), ("Good", "Bad"), ("Yes", "No")),
)
"""Texts of labels that spreadsheets and programs write, desirable and undesirable. None is mapped without being set."""
_LARGEST = 3.4e38
"""Weights and scores are kept as float32."""
_ABSENT = object()


@dataclasses.dataclass(frozen=True, slots=True)
class Feedback:
    """One completion with its feedback.

    Attributes:
      prompt: text, or chat messages `{"role", "content"}` of which the last is not the assistant's, and the first may
        hold tools (`kto_jax.data.rows.turns.TOOLS`).
      completion: what the model is rewarded or punished for; a message where it calls tools.
      desirable: thumbs-up; not decided yet if rows hold scores.
      weight: of the row in the loss, at least 0.
      place: `file:line`, from 1; of a Parquet or JSON file the row's number.
      score: rating, finite; 0 if rows have none.
      sampled: its token ids, if they were kept (`data.sampled_tokens`); then the text is not encoded.
    """

    prompt: str | list[Message]
    completion: Completion
    desirable: bool
    weight: float
    place: str
    score: float = 0.0
    sampled: SampledTokens | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """Two completions of one prompt, of which the first is preferred.

    Attributes:
      chosen: desirable.
      rejected: undesirable; of the same prompt, weight and place.
    """

    chosen: Feedback
    rejected: Feedback

    @property
    def place(self) -> str:
        """`file:line` of the row."""
        return self.chosen.place


class UnmappedLabelError(BadRowError):
    """A label that no setting gives a meaning.

    Attributes:
      label: its text.
    """

    def __init__(self, label: str) -> None:
        super().__init__(f"label is not mapped: {label[:40]!r}{_label_setting(label)}")
        self.label = label


Record = Feedback | Preference | Rejection | Skipped


def completions_of(record: Feedback | Preference) -> tuple[Feedback, ...]:
    """The completions of a row, in the order in which the index holds them."""
    return (record.chosen, record.rejected) if isinstance(record, Preference) else (record,)


def row_of(feedback: Feedback, data: DataConfig) -> dict[str, Any]:
    """A row of the layout "fields" that reads back as this completion.

    Args:
      feedback: read by `records_of`.
      data: by which it was read; scores are kept as scores, and labels as labels.
    """
    prompt, completion = feedback.prompt, feedback.completion
    row: dict[str, Any] = {}
    if isinstance(prompt, list) and prompt[0]["role"] == TOOLS:
        row["tools"], prompt = json.loads(prompt[0]["content"]), prompt[1:]
    row["prompt"] = prompt if isinstance(prompt, str) else [message_of(message) for message in prompt]
    row["completion"] = completion if isinstance(completion, str) else [message_of(completion)]
    if feedback.weight != 1:
        row["weight"] = feedback.weight
    if data.format == "scores":
        row["score"] = feedback.score
    elif data.format != "demonstrations":
        row["label"] = feedback.desirable
    return row


@functools.lru_cache
def template_fields(template: str) -> list[str]:
    """The fields that `data.prompt_template` names.

    Args:
      template: text for `str.format_map`, with plain field names only.

    Returns:
      The names, in order.

    Raises:
      ConfigError: a name is empty, a number, or reaches into a field by `.` or `[`.
    """
    try:
        parsed = [(name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"data.prompt_template={template!r} cannot be read: {error}. Fields are written {{name}}. "
            "Write literal braces twice."
        ) from error
    names = [name for name, _ in parsed]
    bad = [name for name, spec in parsed if not name or name.isdigit() or "." in name or "[" in name or "{" in spec]
    if bad or not names:
        raise ConfigError(
            f"data.prompt_template={template!r} " + (f"names {bad[0]!r}" if bad else "names no field") + ". "
            "Only plain field names are allowed, such as {title}. Name a column of the file."
        )
    return names


def unlabelled(reason: str, data: DataConfig, place: str) -> Rejection | Skipped:
    """What happens to a row without a label or score, by `data.unlabelled`."""
    return Skipped(reason, place) if data.unlabelled == "skip" else Rejection(reason, place)


def record_of(fields: Fields, names: Names, data: DataConfig, place: str) -> Record:
    """Reads an example.

    Args:
      fields: of the row, with what the layout has added.
      names: which of the fields hold the prompt, the completions and the rating.
      data: format, maps and fields that any layout may have.
      place: `file:line` of the row.

    Raises:
      BadRowError: it cannot be used.
    """
    rating: Any = None
    if data.format in ("thumbs", "scores"):
        rating = _rating(fields, names["label" if data.format == "thumbs" else "score"], data)
        if isinstance(rating, Skip):
            return unlabelled(rating.reason, data, place)
        if rating is None:
            return Skipped("its label is mapped to None", place)
    if data.sampled_tokens:
        return _sampled_record(fields, names, data, rating, place)
    prompt = _prompt(fields, names, data)
    prompt = prompt if data.chat_template == "none" else turns_of_transcript(prompt)
    weight = _weight(lookup(fields, names.get("weight", data.weight_field)))
    replies = {key: decoded(present(fields, names[key]), data.roles) for key in _REPLIES[data.format]}
    prompt, completions = part(prompt, replies, may_lack=data.format == "pairs")
    prompt = _with_system(prompt, fields, data)
    prompt = with_tools(prompt, lookup(fields, data.tools_field))
    if data.format == "pairs":
        chosen, rejected = completions
        if chosen == rejected:
            raise BadRowError(SAME_COMPLETIONS)
        return Preference(
            Feedback(prompt, chosen, True, weight, place), Feedback(prompt, rejected, False, weight, place)
        )
    desirable, score = (False, rating) if data.format == "scores" else (rating is not False, 0.0)
    return Feedback(prompt, completions[0], desirable, weight, place, score)


def _sampled_record(fields: Fields, names: Names, data: DataConfig, rating: Any, place: str) -> Record:
    """An example whose token ids were kept. Its text is only shown, so any text will do."""
    prompt, weight = present(fields, names["prompt"]), _weight(lookup(fields, data.weight_field))

    def feedback(key: str, desirable: bool, score: float = 0.0) -> Feedback:
        text = fields.get(names[key], "")
        return Feedback(prompt, text, desirable, weight, place, score, sampled_tokens(fields, names[key]))

    if data.format == "pairs":
        return Preference(feedback("chosen", True), feedback("rejected", False))
    if data.format == "scores":
        return feedback("completion", False, rating)
    return feedback("completion", rating is not False)


def _prompt(fields: Fields, names: Names, data: DataConfig) -> Any:
    if data.layout == "fields" and data.prompt_template:
        # format_map with the named fields alone: the template cannot reach anything else.
        values = {name: present(fields, name) for name in template_fields(data.prompt_template)}
        return check_text(data.prompt_template.format_map(values), "prompt")
    if data.format == "pairs":
        return decoded(lookup(fields, names.get("prompt", "")), data.roles)
    return decoded(present(fields, names["prompt"]), data.roles)


def _with_system(prompt: str | list[Message], fields: Fields, data: DataConfig) -> str | list[Message]:
    """The prompt after the system message of `data.system_field`, if the row has one."""
    system = lookup(fields, data.system_field) if data.system_field else None
    if system is None or system == "":
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns[0]["role"] in ("system", "developer"):
        raise BadRowError(f"the prompt has a system message beside the field {data.system_field!r}")
    return [{"role": "system", "content": check_text(text_of(system), data.system_field)}, *turns]


def _rating(fields: Fields, names: str | tuple[str, ...], data: DataConfig) -> bool | float | Skip | None:
    """The label or score of an example: None if its label is mapped to None, and why if there is none."""
    names = (names,) if isinstance(names, str) else names
    given = [value for name in names if not _is_blank(value := _single(lookup(fields, name)), data)]
    if not given:
        missing = all(lookup(fields, name, _ABSENT) is _ABSENT for name in names)
        field = " or ".join(map(repr, names))
        return Skip(f"missing field {field}" if missing else f"no value in the field {field}")
    if data.format == "scores":
        return _score(given[0])
    labels = {label for value in given if (label := _label(value, data)) is not None}
    if len(labels) > 1:
        return Skip(f"the labels in {' and '.join(map(repr, names))} disagree")
    return next(iter(labels), None)


def _single(value: Any) -> Any:
    """The one element of a list, as programs for annotation write a label; None of an empty one."""
    if isinstance(value, list) and len(value) < 2:
        return value[0] if value else None
    return value


def _is_blank(value: Any, data: DataConfig) -> bool:
    """Whether a label or score is absent: null, pandas' NaN, or an empty cell without a mapping."""
    if isinstance(value, float) and math.isnan(value):
        return "nan" not in data.label_map
    return value is None or (value == "" and "" not in data.label_map)


def _label(value: Any, data: DataConfig) -> bool | None:
    if isinstance(value, bool | str | int | float) and str(value) in data.label_map:
        return data.label_map[str(value)]
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        raise UnmappedLabelError(str(value))
    raise BadRowError(f"label is not a boolean, text or number but {described(value)}")


def _label_setting(label: str) -> str:
    """The setting that would read a label written in a usual way, to be appended to the reason; else nothing."""
    for desirable, undesirable in _USUAL_LABELS:
        if label in (desirable, undesirable):
            label_map = {desirable: True, undesirable: False}
            setting = f'; set --config.data.label_map="{label_map}"'
            ratings = " if there are no other labels; config.data.format='scores' reads ratings"
            return setting + (ratings if _number(label) is not None else "")
    if _number(label) is not None:
        return "; config.data.format='scores' reads numbers"
    return f'; --config.data.label_map="{{{label[:40]!r}: True}}" would make it desirable'


def _weight(value: Any) -> float:
    weight = 1.0 if value is None or value == "" else _number(value)
    if weight is None or weight < 0:
        raise BadRowError(f"weight is not a finite number of at least 0: {str(value)[:40]!r}")
    return weight


def _score(value: Any) -> float:
    score = _number(value)
    if score is None:
        raise BadRowError(f"score is not a finite number: {str(value)[:40]!r}")
    return score


def _number(value: Any) -> float | None:
    """A finite number from a number or text, or None."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None
