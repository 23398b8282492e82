"""Layouts of completions that people or models compared: two with a winner, or a list with ranks or scores.

compared    two completions, in columns that differ by their ending (response_a and response_b, answer_0 and answer_1),
            and which is better: a name of it, its number, one column for each outcome, or a score of each
ranked      a list of completions, with a rank or a score of each inside it or in a list beside it
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import DataConfig
from kto_jax.data.rows.layout import Examples, Fields, Layout, Skip, by_row, example
from kto_jax.data.rows.turns import BadRowError, lookup

_TEXTS = ("conversation", "response", "answer", "completion", "output", "generation", "summary", "text", "candidate")
_ENDINGS = (("_a", "_b"), ("_A", "_B"), ("A", "B"), ("_0", "_1"), ("_1", "_2"), ("0", "1"), ("1", "2"))
_WINNERS = (
    *("winner", "preferred", "preference", "choice", "chosen", "better", "better_response_id", "better_response"),
    *("overall_preference", "preference_strength", "label", "labels", "vote", "annotator_preference"),
)
"""Columns that name the better of two completions, where no setting does."""
_TIES = ("tie", "tie (bothbad)", "both", "bothbad", "neither", "equal", "same", "draw")
_PROMPTS = ("prompt", "instruction", "question", "query", "context", "input", "history", "post")
_LISTS = ("completions", "responses", "answers", "outputs", "candidates", "generations", "replies")
_ITEM_TEXTS = ("response", "completion", "answer", "text", "output", "content", "generation")
_RANKS = ("rank", "ranks", "ranking", "rankings")
_SCORES = ("score", "overall_score", "rating", "reward", "scores", "ratings", "rewards")


def sides_of(fields: Fields) -> tuple[str, str] | None:
    """The columns of two completions; None unless there are exactly two that differ by such an ending."""
    found = [
        (text + first, text + second)
        for text in _TEXTS
        for first, second in _ENDINGS
        if fields.get(text + first) and fields.get(text + second)
    ]
    return found[0] if len(found) == 1 else None


def _compared(data: DataConfig, fields: Fields) -> Examples:
    sides = sides_of(fields)
    if sides is None:
        raise BadRowError("no two columns such as response_a and response_b hold a text each")
    winner = _winner(data, fields, sides)
    if winner is None:
        return [Skip("a tie")]
    completions = [_from_json(fields[side]) for side in sides]
    prompt = _from_json(_prompt_of(fields, data))
    if isinstance(prompt, list) and prompt and all(isinstance(turn, str) for turn in prompt):
        prompt, completions = _interleaved(prompt, completions)
    held = {"prompt": prompt, "chosen": completions[winner], "rejected": completions[1 - winner]}
    return [({**fields, **held}, {name: name for name in held})]


def _prompt_of(fields: Fields, data: DataConfig) -> Any:
    """The prompt, or None where the completions are whole conversations."""
    name = next((name for name in (data.prompt_field, *_PROMPTS) if lookup(fields, name) is not None), None)
    prompt = lookup(fields, name) if name else None
    return prompt["full_text"] if isinstance(prompt, Mapping) and "full_text" in prompt else prompt


def _from_json(value: Any) -> Any:
    """A list of texts that is kept as JSON; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith('["'):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if all(isinstance(text, str) for text in found) else value


def _interleaved(asked: list[Any], completions: list[Any]) -> tuple[Any, list[Any]]:
    """The turns of two conversations as conversations, from the texts of one side and of both others."""
    found = []
    for said in completions:
        if not isinstance(said, list) or len(said) != len(asked):
            raise BadRowError("the prompts and the completions of a conversation are not equally many")
        pairs = zip(asked, said, strict=True)
        roles = [(("user", one), ("assistant", other)) for one, other in pairs]
        found.append([{"role": role, "content": text} for pair in roles for role, text in pair])
    return None, found


def _winner(data: DataConfig, fields: Fields, sides: tuple[str, str]) -> int | None:
    """Which side is better, 0 or 1; None for a tie.

    Raises:
      BadRowError: nothing says so, or several do.
    """
    stem = next(text for text in _TEXTS if sides[0].startswith(text))
    endings = [side.removeprefix(stem) for side in sides]
    one_hot = [fields.get(f"winner_model{ending}") for ending in endings]
    if None not in one_hot:
        won = [str(value) in ("1", "1.0", "True", "true") for value in one_hot]
        return None if won[0] == won[1] else won.index(True)
    own = data.label_field
    names = _WINNERS if own == "label" else (own,) if isinstance(own, str) else own
    named = [name for name in names if lookup(fields, name) not in (None, "") and name not in sides]
    if len(named) == 1:
        return _side(lookup(fields, named[0]), named[0], sides, endings, data)
    scores = [fields.get(f"score{ending}") for ending in endings]
    if not named and all(map(_is_number, scores)):
        first, second = (float(score) for score in scores if score is not None)
        return None if first == second else int(second > first)
    which = ", ".join(map(repr, named)) or "no column"
    raise BadRowError(
        f"{which} says which of {sides[0]!r} and {sides[1]!r} is better; data.label_field names one column"
    )


def _side(value: Any, name: str, sides: tuple[str, str], endings: list[str], data: DataConfig) -> int | None:
    """The side that a value names."""
    text = str(value)
    if text in data.label_map:
        wins = data.label_map[text]
        return None if wins is None else int(not wins)
    if text.lower() in _TIES:
        return None
    number = float(text) if text.lstrip("+-").replace(".", "", 1).isdigit() else None
    if number is not None and name.endswith(("_preference", "_strength")):
        return None if number == 0 else int(number > 0)
    for side, ending in enumerate(endings):
        short = ending.strip("_")
        known = {sides[side], short, short.lower(), f"model{ending}", f"response{ending}", f"{short}.0"}
        if text in known or text.lower() in known:
            return side
    raise BadRowError(
        f"{name} is {text[:40]!r}, which names none of {sides[0]!r} and {sides[1]!r}; "
        f"data.label_map={{{text[:40]!r}: True}} says that the first is better, and None that it is a tie"
    )


def items_of(fields: Fields, data: DataConfig) -> list[tuple[Any, Any, str]] | None:
    """Each completion of a list, its rank or score, and the name of that; None if the row has no such list."""
    own = [data.score_field] if isinstance(data.score_field, str) and data.score_field != "score" else []
    for name in _LISTS:
        held = fields.get(name)
        if not isinstance(held, list) or len(held) < 2:
            continue
        if all(isinstance(item, Mapping) for item in held):
            text = next((key for key in _ITEM_TEXTS if all(item.get(key) for item in held)), None)
            rates = (key for key in (*own, *_RANKS, *_SCORES) if any(_is_number(lookup(item, key)) for item in held))
            if text and (rate := next(rates, None)):
                return [(item[text], lookup(item, rate), rate) for item in held]
        rates = (key for key in (*own, *_RANKS, *_SCORES) if isinstance(lookup(fields, key), list))
        rate = next((key for key in rates if len(lookup(fields, key)) == len(held)), None)
        if rate and all(isinstance(item, str) for item in held):
            return [(item, value, rate) for item, value in zip(held, lookup(fields, rate), strict=True)]
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return abs(float(value)) < float("inf")
    except (TypeError, ValueError, OverflowError):
        return False


def _ranked(data: DataConfig, fields: Fields) -> Examples:
    items = items_of(fields, data)
    if items is None:
        raise BadRowError("no list of completions with a rank or a score of each; data.score_field names the score")
    prompt = _prompt_of(fields, data)
    is_rank = items[0][2] in _RANKS
    if data.format == "scores":
        # The best rank is 1 or 0, so ranks are counted downwards.
        return [
            example(fields, prompt, text, score=-float(rate) if is_rank else rate)
            if _is_number(rate)
            else Skip("a completion without a score")
            for text, rate, _ in items
        ]
    rated = [(float(rate) * (1 if is_rank else -1), text) for text, rate, _ in items if _is_number(rate)]
    found: Examples = [Skip("a completion without a score")] * (len(items) - len(rated))
    return found + list(_neighbours(sorted(rated, key=lambda pair: pair[0]), fields, prompt))


def _neighbours(rated: list[tuple[float, Any]], fields: Fields, prompt: Any) -> Iterator[Any]:
    """Pairs of completions that are next to each other."""
    for (better, chosen), (worse, rejected) in itertools.pairwise(rated):
        if better == worse:
            yield Skip("a completion of the same rank as another")
        else:
            held = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            yield {**fields, **held}, {name: name for name in held}


def _fits_compared(fields: Fields) -> bool:
    sides = sides_of(fields)
    if sides is None or "human_ref_A" in fields:
        return False
    try:
        _winner(DataConfig(), fields, sides)
    except BadRowError:
        return False
    return fields.get("type") != "pairwise_feedback"


COMPARED = {
    "compared": Layout(
        {"pairs": (tuple(text + first for text in _TEXTS for first, _ in _ENDINGS),)},
        by_row(_compared),
        fits=_fits_compared,
    ),
    "ranked": Layout(
        dict.fromkeys(("pairs", "scores"), (_LISTS,)),
        by_row(_ranked),
        fits=lambda fields: items_of(fields, DataConfig()) is not None,
    ),
}
"""See the text at the top of this file."""
