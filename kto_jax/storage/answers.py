"""Answers of a server, kept in a file as they come: a run that is resumed asks for none twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Answers:
    """The answers so far, by key, and the file that keeps them.

    Args:
      record: the file, which is read first; None keeps none.
    """

    def __init__(self, record: Path | None) -> None:
        self._record, self._lock = record, threading.Lock()
        self.known: dict[str, Any] = {}
        if record is not None and record.exists():
            for line in record.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a run that was killed
                    self.known |= json.loads(line)

    def add(self, answers: Mapping[str, Any]) -> None:
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


def ask_all(
    answers: Answers, parts: Sequence[Sequence[str]], ask: Callable[[Sequence[str]], Sequence[Any]], *, at_once: int
) -> None:
    """Asks for the answers to some keys, several requests at once, and keeps those that come before a failure.

    Args:
      answers: what is known, and is added to.
      parts: the keys of each request.
      ask: sends a request: keys -> an answer to each.
      at_once: number of requests at once.
    """

    def one(part: Sequence[str]) -> None:
        answers.add(dict(zip(part, ask(part), strict=True)))

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        asked = [pool.submit(one, part) for part in parts]
        try:
            for future in asked:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
