"""A run's output: messages, the progress bar, metrics.jsonl and the trackers."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from kto_jax.config import ConfigError
from kto_jax.storage.atomic import write_text
from kto_jax.training.trackers import Tracker, group_names


class _Messages(Console):
    """Messages on stderr: formatted at a terminal; elsewhere a log of one line each, with the time."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's `Console.print`, for plain text."""
        if not self.is_terminal and all(isinstance(text, str) for text in objects):
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            objects = (now, *(" ".join(text.splitlines()) for text in objects))
        super().print(*objects, **({"soft_wrap": True} | options))

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Shows a message while the context is open, with a spinner at a terminal, and then its duration."""
        started = time.monotonic()
        if self.is_terminal and not self.quiet:
            with self.status(f"{text} …"):
                yield
        else:
            self.print(f"{text} …")
            yield
        self.print(f"{text}: {time.monotonic() - started:.1f} s")


console = _Messages(stderr=True, markup=False, highlight=False, emoji=False)

# Metrics in the progress bar, by importance, with their formats; and those of a log line.
_SHOWN = {"loss": ".4f", "margin": "+.3f", "auc": ".2f"}
_LOGGED = _SHOWN | {"z0": ".2f", "tokens_per_second": ".0f"}


class MetricsLog:
    """Writes one row per step to metrics.jsonl, flushed at once, and to the trackers; only on the first process."""

    def __init__(
        self, folder: Path, first_step: int, num_steps: int, *, trackers: Sequence[Tracker] = (), enabled: bool = True
    ) -> None:
        """Opens the logs of a run.

        Args:
          folder: the run's folder.
          first_step: steps already taken; later rows, left by a killed run, are dropped.
          num_steps: number of steps of the whole run.
          trackers: other destinations of the metrics.
          enabled: False on all processes but the first; these write nothing.
        """
        self._enabled, self._trackers = enabled, list(trackers)
        self._num_steps, self._last_step = num_steps, first_step
        if not enabled:
            return
        self._path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] <= first_step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a")
        self._progress = progress_bar(console)
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, figures="")

    def __enter__(self) -> MetricsLog:
        if self._enabled:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs the metrics of a step; non-finite values become null in metrics.jsonl.

        Raises:
          ConfigError: metrics.jsonl, or the run's folder, has been removed, renamed or replaced.
        """
        if not self._enabled:
            return
        self._check_in_place()
        self._last_step = step
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        row = {name: finite.get(name) for name in figures}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for tracker in list(self._trackers):
            try:
                tracker.log(step, group_names(finite))
            except Exception as error:  # A tracker's server may fail in any way; the run continues.
                self._drop(tracker, error)
        self._progress.update(self._task, completed=step, figures=_listed(finite, _SHOWN))
        if not console.is_terminal:
            console.print(f"step {step}/{self._num_steps}: {_listed(finite, _LOGGED)}")

    def _check_in_place(self) -> None:
        # An open file that was removed takes what is written to it, and nobody ever reads that.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                return
        raise ConfigError(
            f"{self._path} was removed, renamed or replaced while the run was writing to it. All that is written "
            "now would be lost. Put its folder back and run the same command again, or start in another --workdir."
        )

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        console.print(
            f"warning: the tracker {type(tracker).__name__} failed and gets no more metrics ({error}). "
            "metrics.jsonl has all of them.",
            style="yellow",
        )

    def close(self) -> None:
        """Ends the progress bar and closes the files and the trackers."""
        if not self._enabled:
            return
        self._progress.stop()
        self._file.close()
        for tracker in list(self._trackers):
            try:
                tracker.close(finished=self._last_step == self._num_steps)
            except Exception as error:
                self._drop(tracker, error)


class _TimeLeft(TimeRemainingColumn):
    """The time left, followed by "left" if there is room."""

    def __init__(self, shown_on: Console) -> None:
        super().__init__(compact=True, table_column=Column(no_wrap=True, min_width=7))
        self._shown_on = shown_on

    def render(self, task: Task) -> Text:
        """As rich's `render`."""
        text = super().render(task)
        return text.append(" left") if self._shown_on.width >= 76 else text


def progress_bar(shown_on: Console) -> Progress:
    """A bar with step n/N, the time left and the metrics of the last step; it fits a terminal of 60 columns."""
    return Progress(
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        _TimeLeft(shown_on),
        TextColumn("{task.fields[figures]}", markup=False),
        console=shown_on,
        disable=not shown_on.is_terminal,
        expand=True,
        speed_estimate_period=float("inf"),  # over 1000 steps; rich's 30 s may hold fewer than two slow steps
    )


def _listed(figures: Mapping[str, float], formats: Mapping[str, str]) -> str:
    return " ".join(f"{name} {figures[name]:{style}}" for name, style in formats.items() if name in figures)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a half-written last line, left by a killed run, is dropped.

    Raises:
      ConfigError: another line is not a row.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = [_parse_row(line) for line in lines]
    if None in rows:
        raise ConfigError(
            f"{path}:{rows.index(None) + 1} is damaged. Each line must be a JSON object with a step. Restore the file, "
            "or remove this line, and run the same command again."
        )
    return [row for row in (*rows, _parse_row(last)) if row is not None]


def _parse_row(line: bytes) -> dict | None:
    """A row of metrics; None if the line is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
