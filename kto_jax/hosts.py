"""The processes of a run: how they find each other, and how they agree.

Every process runs the same program on its own devices. A process that does something alone, or decides by what only it
can see, leaves the others waiting: files are written by the first, and decisions are agreed on here.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kto_jax.config import ConfigError, ProcessesConfig

T = TypeVar("T")
_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(config: ProcessesConfig) -> None:
    """Joins the other processes of the run, where there are any; nothing may have touched a device before.

    They are found by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or, without these, as
    JAX finds them: on Cloud TPU and GKE, and in a Slurm step of several tasks.

    Raises:
      ConfigError: the variables are not all there or are no numbers, the others cannot be reached, or there are not as
        many processes as `config.count` says.
    """
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    if not jax.distributed.is_initialized() and (given or _in_cluster()):
        address, count, number = _arguments(given) if given else (None, None, None)
        try:
            jax.distributed.initialize(
                address,
                count,
                number,
                initialization_timeout=config.timeout_seconds,
                heartbeat_timeout_seconds=config.timeout_seconds,
                shutdown_timeout_seconds=config.timeout_seconds,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the processes of the run do not find each other: {str(error).splitlines()[0]}. Each needs the same "
                f"JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, and a JAX_PROCESS_ID of its own. Set them, or raise "
                "config.processes.timeout_seconds."
            ) from None
    if config.count and num_processes() != config.count:
        raise ConfigError(
            f"{num_processes()} processes were started, and config.processes.count={config.count}. They must be "
            "equal. Start as many, or set config.processes.count."
        )


def _arguments(given: dict[str, str]) -> tuple[str, int, int]:
    missing = [name for name in _NAMES if name not in given]
    numbers = {name: given[name] for name in _NAMES[1:] if name in given}
    if missing or not all(number.isdecimal() for number in numbers.values()):
        raise ConfigError(
            f"the environment has {given} and lacks {', '.join(missing) or 'nothing'}. Several processes need "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and, from 0, JAX_PROCESS_ID; one needs none of them. "
            "Set all three, or none."
        )
    address, count, number = (given[name] for name in _NAMES)
    return address, int(count), int(number)


def _in_cluster() -> bool:
    """Whether JAX finds the processes by itself."""
    in_slurm_step = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")) and importlib.util.find_spec("libtpu")
    return in_slurm_step or bool(has_tpu)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return num_processes() == 1 or jax.process_index() == 0


def num_processes() -> int:
    """Processes of the run; touches no device where there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def together(function: Callable[[], T]) -> T:
    """Calls the function, and waits until all processes have; where it refuses on one, all end.

    Raises:
      ConfigError: the function's own, or that another process had one.
    """
    if num_processes() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except ConfigError as raised:
        error = raised
    refused = np.flatnonzero(multihost_utils.process_allgather(np.int32(error is not None)))
    if error:
        raise error
    if len(refused):
        raise ConfigError(
            f"process {refused[0]} of {jax.process_count()} cannot go on. All must. Its own message says what to do."
        )
    return result  # type: ignore[return-value]


def as_first_says(value: bool) -> bool:
    """The first process's value, on all."""
    if num_processes() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def where_any(mask: np.ndarray) -> np.ndarray:
    """Where the mask of any process is set; masks of all processes have one shape."""
    if num_processes() == 1:
        return mask
    return np.any(multihost_utils.process_allgather(mask), axis=0)


def gather(tree: Any) -> Any:
    """Arrays that lie over all devices, as NumPy arrays on every process."""
    if num_processes() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
