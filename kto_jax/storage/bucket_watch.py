"""Ends a process that waits in vain for its bucket.

A request may hang where neither a time limit nor a signal reaches it, for example in TensorStore, which writes the
arrays of checkpoints and repeats its requests for a quarter of an hour. A thread therefore asks the bucket something
small from time to time, and ends the process when no question is answered for too long.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable

from kto_jax.config import ConfigError, TransientError
from kto_jax.config.errors import PREEMPTED

CHECK_SECONDS = 1.0
"""Between calls of `BucketWatch.check`."""
AWAY_SECONDS = 900.0
"""Without an answer after which a run ends; its reads and writes give up earlier (`bucket.PATIENCE_SECONDS`)."""
STOP_SECONDS = 20.0
"""The same after a signal: schedulers kill a process about 30 s after they have asked it to stop."""
_ASK_SECONDS = 5.0


class BucketWatch:
    """Notes when a bucket has answered, and ends the process if it does not.

    Args:
      url: of the run's folder, for the message.
      ask: asks the bucket something small; raises TransientError if it does not answer.
      is_stopping: whether a signal has asked this process to stop.
      end: ends the process.
    """

    def __init__(
        self,
        url: str,
        ask: Callable[[], object],
        is_stopping: Callable[[], bool],
        end: Callable[[int], object],
    ) -> None:
        self._url, self._ask, self._is_stopping, self._end = url, ask, is_stopping, end
        self._answered = time.monotonic()
        self._stopping_since: float | None = None
        self._next_ask = 0.0

    def ask(self) -> None:
        """Asks the bucket once.

        Raises:
          TransientError: it does not answer.
        """
        try:
            self._ask()
        except ConfigError:  # It answers, though not as it should.
            self._answered = time.monotonic()
            raise
        self._answered = time.monotonic()

    def check(self) -> None:
        """Ends the process if the bucket has been silent for too long; must be called every `CHECK_SECONDS`."""
        now = time.monotonic()
        since, limit, after = self._answered, AWAY_SECONDS, ""
        if self._is_stopping():
            self._stopping_since = self._stopping_since or now
            since, limit, after = max(since, self._stopping_since), STOP_SECONDS, " after a signal to stop"
            if now >= self._next_ask:
                # Each in a thread of its own: an earlier question may hang although the bucket answers again.
                self._next_ask = now + _ASK_SECONDS
                threading.Thread(target=self._ask_once, name="asks the bucket", daemon=True).start()
        if now - since > limit:
            print(
                f"error: {self._url} has not answered for {now - since:.0f} s{after}. What the last steps wrote is not "
                "in the bucket, and its newest checkpoint is whole. Run the same command again to resume.",
                file=sys.stderr,
                flush=True,
            )
            self._end(PREEMPTED)

    def _ask_once(self) -> None:
        with contextlib.suppress(ConfigError, TransientError):  # The thread that renews the lease reports them.
            self.ask()
