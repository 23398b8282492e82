"""Watches that steps go on: reports a stall with the stack of every thread, and writes a heartbeat."""

from __future__ import annotations

import collections
import contextlib
import datetime
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import jax

from kto_jax.config import WatchConfig
from kto_jax.config.errors import PREEMPTED
from kto_jax.devices import processes
from kto_jax.storage.atomic import write_text

_FEWEST_STEPS = 3
"""Steps before a median is trusted."""
_TRAINING = "training"


class Watchdog:
    """A thread on every host that notices when no step completes.

    A step is late if it takes longer than `stall_factor` times the median of the last 100 steps, and than
    `stall_seconds`. Evaluations, saves and compilation count as no part of it. A late step is reported once, on each
    host's standard error, with the stacks of all threads. The report needs no cooperation of the thread that hangs,
    unless that holds Python's global lock.

    The first process also writes heartbeat.json: the time, the last step, and what the run does. It is a file of its
    own and no row of metrics.jsonl, because it must be written while no step completes, and replaces what it said
    before.

    Args:
      config: when to report, and whether a stall ends the process.
      folder: the run's folder.
      first_step: steps already taken.
      out: where reports go; standard error by default.
      end: ends the process.
    """

    def __init__(
        self,
        config: WatchConfig,
        folder: Path,
        first_step: int,
        *,
        out: IO[str] | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._config, self._out, self._end = config, out, end
        self._process = jax.process_index() if processes.num_processes() > 1 else 0
        self._heartbeat = folder / "heartbeat.json" if config.heartbeat_seconds and processes.is_first() else None
        self._step, self._doing = first_step, _TRAINING
        self._seconds: collections.deque[float] = collections.deque(maxlen=100)
        self._began = time.monotonic()
        self._next_beat = self._began if self._heartbeat else float("inf")
        self._is_paused = self._is_reported = self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def completed(self, step: int) -> None:
        """Notes that a step has completed."""
        with self._changed:
            now = time.monotonic()
            self._seconds.append(now - self._began)
            self._step, self._began, self._is_reported = step, now, False
            self._changed.notify()

    @contextlib.contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Stops the clock of the step while the context is open; `doing` is shown in the heartbeat."""
        with self._changed:
            before = time.monotonic()
            self._is_paused, self._doing = True, doing
        try:
            yield
        finally:
            with self._changed:
                self._began += time.monotonic() - before
                self._is_paused, self._doing = False, _TRAINING
                self._changed.notify()

    def _run(self) -> None:
        while not self._is_closed:
            self._act()
            with self._changed:
                left = min(self._late_at(), self._next_beat) - time.monotonic()
                if left > 0 and not self._is_closed:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
        if self._heartbeat:
            self._beat()

    def _act(self) -> None:
        """Reports and writes what is due; without the lock, which the steps need."""
        with self._changed:
            is_late = time.monotonic() >= self._late_at()
            self._is_reported |= is_late
        if is_late:
            self._report()
        if time.monotonic() >= self._next_beat:
            self._beat()

    def _late_at(self) -> float:
        """When the step is late."""
        is_timed = self._config.stall_factor and len(self._seconds) >= _FEWEST_STEPS
        if not is_timed or self._is_paused or self._is_reported:
            return float("inf")
        return self._began + max(self._config.stall_factor * self._median(), self._config.stall_seconds)

    def _median(self) -> float:
        return statistics.median(tuple(self._seconds))

    def _report(self) -> None:
        out = self._out or sys.stderr
        after = f"and exits with {PREEMPTED}" if self._config.stall_exit else "and goes on waiting"
        print(
            f"warning: process {self._process} has completed no step for {time.monotonic() - self._began:.0f} s after "
            f"step {self._step}; the median of a step is {self._median():.2g} s (config.watch.stall_factor="
            f"{self._config.stall_factor:g}). It prints the stacks of its threads {after}.",
            file=out,
            flush=True,
        )
        faulthandler.dump_traceback(out, all_threads=True)
        if self._config.stall_exit:
            self._end(PREEMPTED)

    def _beat(self) -> None:
        assert self._heartbeat
        now = time.monotonic()
        self._next_beat = now + self._config.heartbeat_seconds
        values = {
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "step": self._step,
            "seconds_since_step": round(now - self._began, 1),
            "doing": "ending" if self._is_closed else self._doing,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            write_text(self._heartbeat, json.dumps(values) + "\n")
        except OSError as error:
            self._next_beat, self._heartbeat = float("inf"), None
            print(f"warning: no further heartbeat is written: {error}", file=self._out or sys.stderr, flush=True)
