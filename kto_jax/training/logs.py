"""A run's figures: the progress bar, log lines, metrics.jsonl and the trackers."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kto_jax.config import ConfigError
from kto_jax.progress import console, make_step_bar
from kto_jax.storage.atomic import write_text
from kto_jax.training.trackers import Tracker, group_names

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
        self._bar = make_step_bar(console)
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, figures="")
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> MetricsLog:
        if self._enabled:
            self._shown.enter_context(console.showing(self._bar.get_renderable))
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
        self._bar.update(self._task, completed=step, figures=_listed(finite, _SHOWN))
        if not console.is_terminal:
            console.print(f"step {step}/{self._num_steps}: {_listed(finite, _LOGGED)}")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows in the bar what the run does between two steps, in place of the figures."""
        if not self._enabled:
            yield
            return
        figures = self._bar.tasks[0].fields["figures"]
        self._bar.update(self._task, figures=f"{what} …")
        console.draw()
        try:
            yield
        finally:
            if self._bar.tasks[0].fields["figures"] == f"{what} …":
                self._bar.update(self._task, figures=figures)

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
        self._shown.close()
        if console.is_terminal:
            console.print(self._bar.get_renderable())
        self._file.close()
        for tracker in list(self._trackers):
            try:
                tracker.close(finished=self._last_step == self._num_steps)
            except Exception as error:
                self._drop(tracker, error)


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
