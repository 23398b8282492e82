"""An action that a thread repeats in the background, such as a sign of life that other processes look for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from kto_jax.config import ConfigError, TransientError

_LAST_SECONDS = 5.0
"""How long the end waits for an action that is under way; one that hangs must not keep the process alive."""


@contextlib.contextmanager
def repeated(
    seconds: float, action: Callable[[], object], *, name: str, failed: Callable[[Exception], object]
) -> Iterator[None]:
    """Repeats an action in a thread while the body runs; the first one comes after a pause.

    Args:
      seconds: of each pause.
      action: a ConfigError or TransientError that it raises ends nothing.
      name: of the thread.
      failed: is given each such error.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            try:
                action()
            except (ConfigError, TransientError) as error:
                failed(error)

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LAST_SECONDS)
