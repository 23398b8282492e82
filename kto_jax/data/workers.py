"""Starting processes that know nothing of the program that starts them."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def bare_main() -> Iterator[None]:
    """Hides the main module while a process starts: spawn would import it again, and JAX with it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
