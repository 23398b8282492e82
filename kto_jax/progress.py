"""What a command shows on standard error while it works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A progress bar that says what is being done; from `show_progress`."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def start(self, what: str, total: int | None = None) -> None:
        """Begins a phase of `total` pieces; None if their number is not known."""
        self._bar.reset(self._task, description=what, total=total)

    def advance(self, count: int) -> None:
        """Counts pieces that are done."""
        self._bar.advance(self._task, count)


@contextlib.contextmanager
def show_progress(console: Console | None = None) -> Iterator[ProgressBar]:
    """Shows a progress bar on standard error while the body runs; nothing if that is not a terminal.

    Args:
      console: where to show it, in place of standard error.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield ProgressBar(bar)
