"""The layout of what people press on the page of `kto_jax.chat`: one press a row, in the order of pressing.

{"press": "up", "answer": "a1", "prompt": [...], "completion": "A", "ended": true}           or "down"
{"press": "edit", "answer": "a1", "prompt": [...], "completion": "B", "original": "A", "ended": true}
{"press": "choice", "comparison": "c1", "prompt": [...], "better": "A", "worse": "C", "answers": ["a1", "a2"], ...}
{"press": "tie", "comparison": "c1", ...}
{"press": "withdraw", "of": "thumb", "answer": "a1"}                     "edit"; or "choice", of a comparison

Of the presses of one kind on an answer, or on a comparison, the last one counts.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.layout import Examples, Fields, Layout, Rows, Skip, by_row, example
from kto_jax.data.rows.rejection import Rejection, Skipped
from kto_jax.data.rows.turns import BadRowError, lookup, present

KINDS = {"up": "thumb", "down": "thumb", "edit": "edit", "choice": "choice", "tie": "choice"}
"""The kind of each press but "withdraw", which names the kind that it withdraws."""
WITHDRAW = "withdraw"
CUT_LINE = "a last line that was cut while it was written"
REPLACED = "a press that a later one replaced"
WITHDRAWN = "a press that was withdrawn"
WITHDRAWAL = "a withdrawal"
TWICE = "a press that is in the file twice"
CUT_ANSWER = "a press on an answer that was cut at its longest length, which would be trained to end there"
_DECIDED = "decided"
"""Answers whose label an edit or a choice leaves alone, because a press that says more has one for them."""

Key = tuple[str, str]
"""A kind of press, and the answer or the comparison that it is about."""


def key_of(fields: Any) -> Key | None:
    """What a press decides; None if the row is no press."""
    if not isinstance(fields, Mapping):
        return None
    press = fields.get("press")
    kind = fields.get("of") if press == WITHDRAW else KINDS.get(str(press))
    about = fields.get("comparison" if kind == "choice" else "answer")
    return (str(kind), about) if kind in KINDS.values() and isinstance(about, str) and about else None


def standing(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows of a whole file, with a `Skipped` in place of each that no longer counts.

    Args:
      rows: place and fields. All are held in memory.

    Yields:
      Every row in order. Edits and choices get the answers whose labels they do not decide.
    """
    rows = list(rows)
    if rows and isinstance(rows[-1][1], Rejection) and rows[-1][1].reason.startswith("invalid"):
        rows[-1] = (rows[-1][0], Skipped(CUT_LINE, rows[-1][0]))
    keys = [key_of(fields) for _, fields in rows]
    later: dict[Key, str] = {}
    reasons: dict[int, str] = {}
    seen: set[Any] = set()
    for number in range(len(rows) - 1, -1, -1):
        key, fields = keys[number], rows[number][1]
        if key is None:
            continue
        if fields.get("id") is not None and str(fields["id"]) in seen:
            reasons[number] = TWICE
            continue
        seen.add(str(fields.get("id")))
        if fields["press"] == WITHDRAW:
            reasons[number] = WITHDRAWAL
        elif key in later:
            reasons[number] = WITHDRAWN if later[key] == WITHDRAW else REPLACED
        later[key] = fields["press"]
    counting = [key for number, key in enumerate(keys) if key is not None and number not in reasons]
    thumbs = frozenset(answer for kind, answer in counting if kind == "thumb")
    edits = frozenset(answer for kind, answer in counting if kind == "edit")
    for number, (place, fields) in enumerate(rows):
        if number in reasons:
            yield place, Skipped(reasons[number], place)
        elif (key := keys[number]) is None or key[0] == "thumb":
            yield place, fields
        else:
            yield place, {**fields, _DECIDED: thumbs if key[0] == "edit" else thumbs | edits}


def count(rows: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """How many presses of each sort count, and how many rows do not, by reason."""
    found: collections.Counter[str] = collections.Counter()
    for _, fields in standing(rows):
        if isinstance(fields, Skipped | Rejection):
            found[fields.reason] += 1
        elif key_of(fields) is not None:
            found[fields["press"]] += 1
    return dict(found)


def _read(data: DataConfig, fields: Fields) -> Examples:
    press = present(fields, "press")
    if key_of(fields) is None:
        raise BadRowError(f"press {str(press)[:20]!r} is none of {', '.join([*KINDS, WITHDRAW])}, or names no answer")
    if press == "tie":
        return [Skip("a tie")]
    if data.format == "pairs":
        return _pairs(press, fields)
    if press in ("up", "down"):
        return [_thumb(fields, present(fields, "completion"), press == "up", _ended(fields))]
    decided = fields.get(_DECIDED, ())
    if press == "edit":
        found: Examples = [_thumb(fields, present(fields, "completion"), True, True)]
        if fields["answer"] not in decided:
            found.append(_thumb(fields, present(fields, "original"), False, _ended(fields)))
        return found
    answers = fields.get("answers")
    answers = answers if isinstance(answers, list) and len(answers) == 2 else [None, None]
    sides = zip(("better", "worse"), answers, (True, False), strict=True)
    found = [
        _thumb(fields, present(fields, name), label, _ended(fields))
        for name, answer, label in sides
        if answer not in decided
    ]
    return found or [Skip("a choice between answers that have thumbs or edits of their own")]


def _pairs(press: str, fields: Fields) -> Examples:
    if press in ("up", "down"):
        return [Skip("a thumb, which data.format='thumbs' reads")]
    if not _ended(fields):
        return [Skip(CUT_ANSWER)]
    better, worse = ("completion", "original") if press == "edit" else ("better", "worse")
    held = {"prompt": present(fields, "prompt"), "chosen": present(fields, better), "rejected": present(fields, worse)}
    return [({**fields, **held}, {name: name for name in held})]


def _thumb(fields: Fields, completion: Any, label: bool, ended: bool) -> Any:
    if not ended:
        return Skip(CUT_ANSWER)
    return example(fields, present(fields, "prompt"), completion, label=label)


def _ended(fields: Fields) -> bool:
    return lookup(fields, "ended", True) is not False


def _gather(rows: Rows) -> Rows:
    return standing(rows)


PRESSED = {
    "presses": Layout(
        {"thumbs": ("press",), "pairs": ("press",)},
        by_row(_read),
        _gather,
        fits=lambda fields: key_of(fields) is not None,
    ),
}
"""See the text at the top of this file."""
