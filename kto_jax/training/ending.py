"""How a command that writes checkpoints ends its process."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from kto_jax.config.errors import FAILED

_failed_writes: list[bool] = []
_decided: list[int] = []
"""The exit code of `run_to_end`."""


def _end() -> None:
    if _decided:
        _exit_now(_decided[-1])


# Python forgets its signal handlers after the callbacks of `atexit`, and then frees what libraries hold: a SIGTERM in
# that time would end the process by the signal, which launch scripts take for the end of the run. The callback that was
# registered first is the last one, so this module is imported before others.
atexit.register(_end)


def _exit_now(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def note_failed_write() -> None:
    """Notes that a write of Orbax has failed in this process."""
    _failed_writes.append(True)


def run_to_end(main: Callable[[], int]) -> NoReturn:
    """Runs a command, and ends this process with the code that it returns.

    If a write has failed, the process ends at once: Orbax leaves threads that wait for minutes for what was never
    written, and Python waits for its threads.
    """
    exit_code = FAILED
    try:
        exit_code = main()
    except SystemExit as ending:  # by a signal outside the steps
        exit_code = int(ending.code or 0)
    except BaseException:
        if not _failed_writes:
            raise
        traceback.print_exc()
    finally:
        # The exit code is decided, but Python takes seconds to end, or longer if a library's thread hangs.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
        _decided.append(exit_code)
    if _failed_writes:
        _exit_now(exit_code)
    sys.exit(exit_code)
