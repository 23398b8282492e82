"""The processes of a run: how they find each other, and how they agree.

Every process runs the same program on its own devices. A process that does something alone, or decides by what only it
can see, leaves the others waiting: files are written by the first, and decisions are agreed on here.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its service alone lets processes talk without devices
from jax.experimental import multihost_utils

from kto_jax.config import ConfigError, ProcessesConfig
from kto_jax.models.gather import gather as gather_array

T = TypeVar("T")
_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FAILED = "failed"
_TURNS = itertools.count()
"""All processes talk in one order; the number of the turn tells their words apart."""


def join(config: ProcessesConfig) -> None:
    """Joins the other processes of the run, where there are any; nothing may have touched a device before.

    They are found by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or, without these, as
    JAX finds them: on Cloud TPU and GKE, and in a Slurm step of several tasks.

    Raises:
      ConfigError: the variables are not all there or are no numbers, the others cannot be reached, or there are not as
        many processes as `config.count` says.
    """
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    alone = config.count == 1 and not given
    if not jax.distributed.is_initialized() and not alone and (given or _in_cluster()):
        _initialize(*(_arguments(given) if given else (None, None, None)), timeout=config.timeout_seconds)
    if config.count and num_processes() != config.count:
        raise ConfigError(
            f"{num_processes()} processes were started, and config.processes.count={config.count}. They must be "
            "equal. Start as many, or set config.processes.count."
        )


def _initialize(address: str | None, count: int | None, number: int | None, *, timeout: int) -> None:
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (RuntimeError, ValueError) as error:
        if address is None and "coordinator_address should be defined" in str(error):
            return  # a TPU of its own, outside of any cluster
        raise ConfigError(
            f"the processes of the run do not find each other: {str(error).splitlines()[0].rstrip('.')}. Each needs "
            "the same JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, and a JAX_PROCESS_ID of its own. Set them; where "
            "they are right, raise config.processes.timeout_seconds; for one process, config.processes.count=1."
        ) from None


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
    # A batch script that calls Python without srun has a rank, and no step.
    in_slurm_step = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")) and importlib.util.find_spec("libtpu")
    return in_slurm_step or bool(has_tpu)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return num_processes() == 1 or jax.process_index() == 0


def num_processes() -> int:
    """Processes of the run; touches no device where there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def together(function: Callable[[], T]) -> T:
    """Calls the function, and waits until all processes have; where it fails on one, all end.

    The one that fails raises at once; the others when they come here.

    Raises:
      ConfigError: the function's own, or that another process has failed.
    """
    try:
        result = function()
    except BaseException:
        if num_processes() > 1:
            _put(_FAILED)
        raise
    failed = [number for number, word in enumerate(tell("done")) if word == _FAILED]
    if failed:
        raise ConfigError(
            f"process {failed[0]} of {num_processes()} cannot go on. All must. Its own message says what to do."
        )
    return result


def tell(word: str) -> list[str]:
    """Tells all processes a word, and waits, however long, for theirs.

    It takes no device: those time out where one process has more to do than the others.

    Returns:
      The words, by process.
    """
    if num_processes() == 1:
        return [word]
    turn = _put(word)
    return [_get(f"kto_jax/{turn}/{number}") for number in range(num_processes())]


def _put(word: str) -> int:
    turn = next(_TURNS)
    _service().key_value_set(f"kto_jax/{turn}/{jax.process_index()}", word)
    return turn


def _get(key: str) -> str:
    while True:
        try:
            # In pieces, so that a signal is heard.
            return _service().blocking_key_value_get(key, 2000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _service() -> Any:
    return distributed.global_state.client


def as_first_says(value: bool) -> bool:
    """The first process's value, on all."""
    return tell(str(value))[0] == "True"


def where_any(mask: np.ndarray) -> np.ndarray:
    """Where the mask of any process is set; masks of all processes have one shape."""
    if num_processes() == 1:
        return mask
    return np.any(multihost_utils.process_allgather(mask), axis=0)


def gather(tree: Any) -> Any:
    """Arrays that lie over all devices, as NumPy arrays on every process."""
    if num_processes() == 1:
        return jax.device_get(tree)
    return jax.tree.map(gather_array, tree)
