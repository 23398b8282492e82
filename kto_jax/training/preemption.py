"""Requests to stop: SIGTERM from a scheduler, SIGHUP from a terminal that closes, Ctrl-C from a user."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from kto_jax.config.errors import INTERRUPTED, PREEMPTED
from kto_jax.devices import processes

_SHOW_CURSOR = "\x1b[?25h"
_SYNC_POINTS = itertools.count()
"""Numbers the calls of JAX's preemption service, which requires equal numbers on all processes."""


class Preemption:
    """Handles the signals of a run while the context is open.

    Outside the steps, a signal ends the process at once: the next run starts over or resumes. During the steps
    (`deferred`) it is only recorded, and the loop checks for it after every step. A thread prints an answer to every
    Ctrl-C at once. A second Ctrl-C ends the process at once, even while the main thread is inside compiled code.

    SIGHUP is answered as SIGTERM is, unless the process ignores it (nohup).

    With several processes, JAX's preemption service receives SIGTERM and agrees on a step at which all processes stop.
    SIGHUP is passed on to it as SIGTERM. There is no agreement on a Ctrl-C, so it ends each process at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        self._receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        # Python writes every signal's number there at once; handlers wait for the main thread.
        self._previous_descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._previous_descriptor)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._sender.close()
        self._listener.join()
        self._receiver.close()

    def _listen(self) -> None:
        """Answers Ctrl-C; the handler cannot while the main thread is inside compiled code."""
        presses = 0
        while numbers := self._receiver.recv(64):
            for number in numbers:
                if number == signal.SIGINT:
                    presses += 1
                    self._answer(presses)

    def _answer(self, presses: int) -> None:
        at_terminal = sys.stderr.isatty()
        if presses > 1:
            _print(f"{_SHOW_CURSOR if at_terminal else ''}stopped at once")
            os._exit(INTERRUPTED)
        saves = self._deferred and not _several_processes()
        _print("stopping after this step; press again to stop now" if saves else "stopping; press again to stop now")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and _several_processes():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._signal = number
        if self._deferred and not _several_processes():
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(PREEMPTED)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Records signals for `requested`, instead of ending the process."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def requested(self) -> bool:
        """Whether the run should save and stop; all processes must call this together and get the same answer."""
        return reached_sync_point() if _several_processes() else self._signal is not None

    def was_signalled(self) -> bool:
        """Whether this process, or any of several, has seen a signal to stop; unlike `requested`, at any time."""
        return self._signal is not None or (_several_processes() and processes.any_was_told_to_stop())

    @property
    def exit_code(self) -> int:
        """The exit code after a requested stop."""
        return INTERRUPTED if self._signal == signal.SIGINT else PREEMPTED


def reached_sync_point() -> bool:
    """Whether JAX's preemption service asks all processes to stop now.

    All processes must call this the same number of times.
    """
    return multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS))


def _several_processes() -> bool:
    # Uses no device, because devices may not be initialised yet.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _print(text: str) -> None:
    """Writes a line to stderr, bypassing Python's buffers, whose locks the main thread may hold."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\r{text}\n".encode() if sys.stderr.isatty() else f"{text}\n".encode())
