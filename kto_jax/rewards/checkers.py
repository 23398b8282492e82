"""Rewards that a program can verify: 1 if a completion keeps a rule, else 0; and a penalty on long completions.

--reward="max_words(12)" --reward="ends_with('.') * 0.5"

A checker reads the completion's text alone, except `equals_number`, which also reads a column of the prompts' file, and
`overlong`, which counts tokens.
Leading and trailing white space does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from kto_jax.rewards.messages import text_of

Checker = Callable[..., list[float | None]]


def _checker(keeps: Callable[[str], bool]) -> Checker:
    def check(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [float(keeps(text_of(completion).strip())) for completion in completions]

    return check


def lowercase() -> Checker:
    """The text has letters, none of them upper case."""
    return _checker(lambda text: text.islower())


def no_commas() -> Checker:
    """The text is not empty and has no comma."""
    return _checker(lambda text: bool(text) and "," not in text)


def max_words(count: int) -> Checker:
    """The text has at least one word and at most `count`."""
    return _checker(lambda text: 1 <= len(text.split()) <= count)


def min_words(count: int) -> Checker:
    """The text has at least `count` words."""
    return _checker(lambda text: len(text.split()) >= count)


def starts_with(beginning: str) -> Checker:
    """The text starts with these characters."""
    return _checker(lambda text: text.startswith(beginning))


def ends_with(ending: str) -> Checker:
    """The text ends with these characters."""
    return _checker(lambda text: text.endswith(ending))


def contains(keyword: str) -> Checker:
    """The text has the keyword as a whole word, in upper or lower case."""
    pattern = re.compile(rf"(?<!\w){re.escape(keyword)}(?!\w)", re.IGNORECASE)
    return _checker(lambda text: pattern.search(text) is not None)


def bullets(count: int) -> Checker:
    """Exactly `count` lines start with "- " or "* "."""
    return _checker(lambda text: len(re.findall(r"^\s*[-*] \S", text, re.MULTILINE)) == count)


def is_json() -> Checker:
    """The text is one JSON object or list, and nothing else."""

    def keeps(text: str) -> bool:
        try:
            return isinstance(json.loads(text), dict | list)
        except (ValueError, RecursionError):
            return False

    return _checker(keeps)


def equals_number(column: str = "answer") -> Checker:
    """The last number in the text is the number in a column of the prompts' file; None if that column has none."""

    def check(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = columns.get(column, [None] * len(completions))
        return [_same(text_of(said), answer) for said, answer in zip(completions, answers, strict=True)]

    return check


def overlong(limit: int, buffer: int) -> Checker:
    """DAPO's penalty: 0 up to `limit` − `buffer` tokens, then falling evenly to −1 at `limit`, arXiv 2503.14476."""
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer={buffer} is not between 0 and limit={limit}")

    def check(num_tokens: Sequence[int], **columns: Any) -> list[float | None]:
        return [-min(max((count - (limit - buffer)) / buffer, 0.0), 1.0) for count in num_tokens]

    return check


def _same(text: str, answer: Any) -> float | None:
    wanted = _last_number(str(answer))
    return None if wanted is None else float(_last_number(text) == wanted)


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


CHECKERS: dict[str, Callable[..., Checker]] = {
    make.__name__: make
    for make in (
        lowercase, no_commas, max_words, min_words, starts_with, ends_with, contains, bullets, is_json, equals_number,
        overlong,
    )
}  # fmt: skip
"""What `--reward` takes by name."""
