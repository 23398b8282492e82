"""Rewards from a server, asked by HTTP: several rows in a request, several requests at once, failures tried again.

    POST URL   {"prompts": [...], "completions": [...], "ended": [...], "num_tokens": [...], "columns": {...}}
    answer     {"rewards": [number or null, one for each completion]}

Answers are kept in a file as they come: a run that is resumed asks for none twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage.answers import Answers, ask_all
from kto_jax.storage.http_post import TRIES, PostError, post_json

TOKEN = "KTO_JAX_REWARD_TOKEN"
"""Environment variable whose value is sent as a bearer token."""
_ROWS = 16
_AT_ONCE = 4
_SECONDS = 60.0

Row = dict[str, Any]
"""prompt, completion, ended, num_tokens and columns of one completion."""


class Endpoint:
    """The reward of a server.

    Args:
      url: http:// or https://.
      wait: waits a number of seconds before a request is repeated.
    """

    def __init__(self, url: str, wait: Callable[[float], object] = time.sleep) -> None:
        self._url, self._wait = url, wait

    def rewards(self, rows: Sequence[Row], record: Path | None) -> list[float | None]:
        """One reward for each row.

        Args:
          rows: what is scored. Equal rows are asked for once.
          record: file of the answers, which is read first; None keeps none.

        Raises:
          ConfigError: the server refuses a request, or answers something else.
          TransientError: it cannot be reached, or fails.
        """
        keys = [self._key(row) for row in rows]
        answers = Answers(record)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in answers.known}
        unknown = list(missing)
        parts = [unknown[start : start + _ROWS] for start in range(0, len(unknown), _ROWS)]
        ask_all(answers, parts, lambda part: self._ask([missing[key] for key in part]), at_once=_AT_ONCE)
        return [answers.known[key] for key in keys]

    def _key(self, row: Row) -> str:
        text = json.dumps([self._url, row], sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _ask(self, rows: Sequence[Row]) -> list[float | None]:
        names = dict.fromkeys(name for row in rows for name in row["columns"])
        body = {
            "prompts": [row["prompt"] for row in rows],
            "completions": [row["completion"] for row in rows],
            "ended": [row["ended"] for row in rows],
            "num_tokens": [row["num_tokens"] for row in rows],
            "columns": {name: [row["columns"].get(name) for row in rows] for name in names},
        }
        content = json.dumps(body, default=str).encode("utf-8", "surrogatepass")
        try:
            answer = post_json(self._url, content, token=TOKEN, seconds=_SECONDS, wait=self._wait)
        except PostError as error:
            if not error.may_pass:
                raise self._refusal(str(error)) from None
            raise TransientError(
                f"the reward {self._url} {error}; it was asked {TRIES} times. The completions that were sampled and "
                "the answers so far are kept. Run the same command again once the server is up."
            ) from None
        return self._checked(answer, len(rows))

    def _checked(self, content: bytes, count: int) -> list[float | None]:
        try:
            found = json.loads(content)["rewards"]
        except (ValueError, KeyError, TypeError):
            raise self._refusal(f"answered {content[:80]!r}") from None
        if not isinstance(found, list) or len(found) != count:
            raise self._refusal(
                f"answered {len(found) if isinstance(found, list) else type(found).__name__} rewards for {count} "
                "completions"
            )
        for value in found:
            if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
                raise self._refusal(f"answered {value!r}")
        return [None if value is None else float(value) for value in found]

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f'the reward {self._url} {what}. An answer is {{"rewards": [...]}} with one finite number, or null, for '
            "each completion. Correct the server, or take it out of --reward. Completions and answers so far are kept."
        )
