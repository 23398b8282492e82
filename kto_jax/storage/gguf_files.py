"""GGUF files, which are untrusted: opened with a bound on what their header may claim."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.config.packages import require

_MOST_VALUES = 1 << 23
"""Values in a file's metadata. A vocabulary of 256,000 tokens with scores, types and merges has a million."""


def open_gguf_file(path: Path) -> Any:
    """Opens a file and reads its header.

    Args:
      path: the file.

    Returns:
      The `gguf.GGUFReader`.

    Raises:
      ConfigError: the gguf package is missing, or the file is damaged or not GGUF.
    """
    require("gguf", str(path), "set a Hugging Face directory of the same model")
    try:
        return _reader_class()(path)
    except Exception as error:  # The reader may raise anything on a broken file.
        raise ConfigError(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {error}). A whole .gguf file of a Llama-type "
            "model is needed. Download the file again."
        ) from error


@functools.cache
def _reader_class() -> Any:
    import gguf
    import numpy as np

    class Bounded(gguf.GGUFReader):
        """Refuses a header that ends within a value or holds too many of them.

        The base reads nothing past the end of the file, without an error: an array that claims 2^60 values then fills
        the memory with empty ones.
        """

        num_values = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            self.num_values += 1
            if self.num_values > _MOST_VALUES:
                raise ValueError(f"its metadata holds more than {_MOST_VALUES} values")
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends within a value")
            return super()._get(offset, dtype, count, override_order)

    return Bounded
