"""What a command shows on standard error while it works.

At a terminal messages scroll by above one line, which shows what is being done and how far it is. Elsewhere standard
error is a log: one line for each message, with the time, and no line that is drawn anew.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


class Messages(Console):
    """Messages on standard error, above the line that shows what is being done."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"markup": False, "highlight": False, "emoji": False} | options))
        self._shown: list[Callable[[], RenderableType]] = []
        self._live: Live | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's `Console.print`, for plain text."""
        if not self.is_terminal and all(isinstance(text, str) for text in objects):
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            objects = (now, *(" ".join(text.splitlines()) for text in objects))
        super().print(*objects, **({"soft_wrap": True} | options))

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Shows what is being done while the context is open, and then how long it took."""
        started = time.monotonic()
        if not self.is_terminal:
            self.print(f"{text} …")
        with self.working(text):
            yield
        self.print(f"{text}: {time.monotonic() - started:.1f} s")

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Shows what is being done while the context is open; nothing if this is no terminal."""
        spinner = Progress(
            SpinnerColumn(), _what(), TimeElapsedColumn(), TextColumn(" "), console=self, disable=not self.is_terminal
        )
        spinner.add_task(f"{text} …", total=None)
        with self.showing(spinner.get_renderable):
            yield

    @contextlib.contextmanager
    def showing(self, render: Callable[[], RenderableType]) -> Iterator[None]:
        """Shows something below the messages while the context is open, in place of what is shown there.

        Args:
          render: what is shown; asked several times a second.
        """
        if not self.is_terminal or self.quiet:
            yield
            return
        self._shown.append(render)
        self.draw()
        try:
            yield
        finally:
            self.draw()
            self._shown.remove(render)
            self.draw()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the terminal to a library that draws its own progress."""
        shown, self._shown = self._shown, []
        self.draw()
        try:
            yield
        finally:
            self._shown = shown
            self.draw()

    def draw(self) -> None:
        """Draws the line below the messages anew; begins or ends with it."""
        if not self._shown:
            if self._live is not None:
                self._live.stop()
                self._live = None
        elif self._live is not None:
            self._live.refresh()
        else:
            self._begin()

    def _begin(self) -> None:
        # What goes into a file or a pipe must not turn up on the terminal.
        to_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            console=self,
            get_renderable=lambda: self._shown[-1]() if self._shown else "",
            refresh_per_second=8,
            transient=True,
            redirect_stdout=to_terminal,
        )
        self._live.start(refresh=True)


console = Messages(stderr=True)


class ProgressBar:
    """A bar that says what is being done; from `show_progress`."""

    def __init__(self, shown_on: Messages, *, logs: bool) -> None:
        self.bar = make_bar(shown_on, MofNCompleteColumn())
        self._shown_on, self._logs = shown_on, logs
        self._task = self.bar.add_task("", total=None, visible=False)

    def start(self, what: str, total: int | None = None) -> None:
        """Begins a phase of `total` pieces; None if their number is not known."""
        self.bar.reset(self._task, description=what, total=total, visible=True)
        self._shown_on.draw()
        if self._logs and not self._shown_on.is_terminal:
            self._shown_on.print(f"{what}{f' ({total})' if total else ''} …")

    def advance(self, count: int) -> None:
        """Counts pieces that are done."""
        self.bar.advance(self._task, count)


@contextlib.contextmanager
def show_progress(shown_on: Messages | None = None, *, logs: bool = False) -> Iterator[ProgressBar]:
    """Shows a progress bar while the body runs.

    Args:
      shown_on: where to show it, in place of standard error.
      logs: what is said if that is not a terminal: a line for each phase, or nothing.
    """
    shown_on = shown_on or console
    progress = ProgressBar(shown_on, logs=logs)
    with shown_on.showing(progress.bar.get_renderable):
        yield progress


class _TimeLeft(TimeRemainingColumn):
    """The time left, followed by "left" if there is room."""

    def __init__(self, shown_on: Console) -> None:
        super().__init__(compact=True, table_column=Column(no_wrap=True, min_width=7))
        self._shown_on = shown_on

    def render(self, task: Task) -> Text:
        """As rich's `render`."""
        text = super().render(task)
        return text.append(" left") if self._shown_on.width >= 76 else text


def make_bar(shown_on: Console, count: ProgressColumn | None = None) -> Progress:
    """A bar with what is being done, how much is done and the time left; it fits a terminal of 60 columns.

    Args:
      shown_on: where it will be shown, by `Messages.showing`.
      count: how much is done; a percentage by default.
    """
    columns = (_what(ratio=2), _bar(), count or TaskProgressColumn(), _TimeLeft(shown_on))
    return Progress(*columns, console=shown_on, expand=True)


def make_step_bar(shown_on: Console) -> Progress:
    """A bar with step n/N, the time left and the field `figures`; it fits a terminal of 60 columns."""
    return Progress(
        _bar(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        _TimeLeft(shown_on),
        TextColumn("{task.fields[figures]}", markup=False),
        console=shown_on,
        expand=True,
        speed_estimate_period=float("inf"),  # over 1000 steps; rich's 30 s may hold fewer than two slow steps
    )


def _what(ratio: int | None = None) -> TextColumn:
    column = Column(no_wrap=True, overflow="ellipsis", ratio=ratio)
    return TextColumn("{task.description}", markup=False, table_column=column)


def _bar() -> BarColumn:
    return BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4))


def announce_import() -> None:
    """Says at a terminal why nothing happens yet: the imports of a command take seconds."""
    if console.is_terminal:
        console.print("importing JAX …")


def next_lines(*commands: str) -> list[str]:
    """The last lines of a command: what to do next.

    Args:
      commands: each without `python -m kto_jax.`.
    """
    return [f"next: python -m kto_jax.{command}" for command in commands]
