"""Rewards from a server, asked by HTTP: several rows in a request, several requests at once, failures tried again.

    POST URL   {"prompts": [...], "completions": [...], "ended": [...], "num_tokens": [...], "columns": {...}}
    answer     {"rewards": [number or null, one for each completion]}

Answers are kept in a file as they come: a run that is resumed asks for none twice.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, TransientError

TOKEN = "KTO_JAX_REWARD_TOKEN"
"""Environment variable whose value is sent as a bearer token."""
_ROWS = 16
_AT_ONCE = 4
_TRIES = 5
_SECONDS = 60.0
_MAY_PASS = (408, 425, 429)

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
        answers = _Answers(record)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in answers.known}
        unknown = list(missing)
        parts = [unknown[start : start + _ROWS] for start in range(0, len(unknown), _ROWS)]

        def ask(part: list[str]) -> None:
            answers.add(dict(zip(part, self._ask([missing[key] for key in part]), strict=True)))

        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = [pool.submit(ask, part) for part in parts]
            try:
                for future in asked:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
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
        for attempt in range(_TRIES):
            try:
                return self._checked(self._send(content), len(rows))
            except urllib.error.HTTPError as error:
                error.close()
                failure = f"answered {error.code} {error.reason}"
                if error.code < 500 and error.code not in _MAY_PASS:
                    raise self._refusal(failure) from None
            except (OSError, TimeoutError) as error:  # URLError is one
                failure = f"cannot be reached: {getattr(error, 'reason', error)}"
            if attempt + 1 < _TRIES:
                self._wait(2.0**attempt)
        raise TransientError(
            f"the reward {self._url} {failure}; it was asked {_TRIES} times. The completions that were sampled and the "
            "answers so far are kept. Run the same command again once the server is up."
        )

    def _send(self, content: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {os.environ[TOKEN]}"
        request = urllib.request.Request(self._url, content, headers)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return answer.read()

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


class _Answers:
    """The answers so far, by key, and the file that keeps them."""

    def __init__(self, record: Path | None) -> None:
        self._record, self._lock = record, threading.Lock()
        self.known: dict[str, float | None] = {}
        if record is not None and record.exists():
            for line in record.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a run that was killed
                    self.known |= json.loads(line)

    def add(self, answers: dict[str, float | None]) -> None:
        """Keeps some more."""
        with self._lock:
            self.known |= answers
            if self._record is not None:
                self._record.parent.mkdir(parents=True, exist_ok=True)
                with self._record.open("a", encoding="utf-8") as file:
                    # On a line of its own, also after one that was not finished.
                    file.write("\n" + json.dumps(answers) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
