"""Arrays that are sharded over several processes, brought to each of them."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(array: jax.Array) -> np.ndarray:
    """The whole of an array on every process; all must call it, unless the array is on this process's devices alone."""
    whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(whole)
