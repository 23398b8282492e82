"""Gathers arrays that are sharded over several processes."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(array: jax.Array) -> np.ndarray:
    """The whole array on every process. All must call it, unless it is on this process's devices alone."""
    whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(whole)
