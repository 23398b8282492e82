"""Where the figures of a run go: metrics.jsonl, TensorBoard, and a progress bar with the time left."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

console = Console(stderr=True)

# What the progress bar shows of a step, with the format of each.
_SHOWN = {"loss": ".4f", "margin": "+.3f", "z0": ".2f", "auc": ".2f", "tokens_per_second": ".0f"}


class MetricsLog:
    """Writes one row per step, on the first process alone; a row is on disk before the next step begins."""

    def __init__(self, workdir: Path, *, first_step: int, num_steps: int, enabled: bool) -> None:
        """Opens the logs of a run.

        Args:
          workdir: the run's folder.
          first_step: steps already taken; rows beyond them, left by a run that was killed, are dropped.
          num_steps: steps of the whole run.
          enabled: False on all processes but the first, which then write nothing.
        """
        self._enabled = enabled
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=first_step, figures="")
        self._progress.start()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs the figures of a step; one that is not finite becomes null in metrics.jsonl."""
        if not self._enabled:
            return
        row = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        if "loss" in figures:
            known = {name: figures[name] for name in _SHOWN if math.isfinite(figures.get(name, math.nan))}
            shown = " ".join(f"{name} {value:{_SHOWN[name]}}" for name, value in known.items())
            self._progress.update(self._task, completed=step, figures=shown)
            if not console.is_terminal:
                console.print(f"step {step}: {shown}", highlight=False)

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._enabled:
            self._progress.stop()
            self._board.close()
            self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a half-written last line, left by a kill, is dropped."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
