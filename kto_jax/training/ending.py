"""How a command that writes checkpoints ends its process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from kto_jax.config.errors import FAILED

_failed_writes: list[bool] = []


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
    if _failed_writes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
