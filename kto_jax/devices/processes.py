"""The processes of a run: how they connect, and how they agree on decisions.

Every process runs the same program on its own devices. A process that acts alone, or decides on local information,
leaves the others waiting. The first process therefore writes the files, and processes agree on decisions here.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # only its service lets processes communicate without devices
from jax.experimental import multihost_utils

from kto_jax.config import ConfigError, ProcessesConfig, TransientError
from kto_jax.models.gather import gather as gather_array

T = TypeVar("T")
_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FAILED, _FAILED_FOR_NOW = "failed", "failed for now"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
"""The key under which JAX's preemption service tells all processes of a SIGTERM to one."""
_TURNS = itertools.count()
"""All processes exchange strings in the same order; the number of an exchange identifies it."""


def join(config: ProcessesConfig) -> None:
    """Joins the other processes of the run, if there are any; must be called before any device is used.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe them. Without these, JAX detects
    them on Cloud TPU and GKE, and in a Slurm step of several tasks.

    Raises:
      ConfigError: the variables are incomplete or not numbers, or the number of processes is not `config.count`.
      TransientError: the others cannot be reached.
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
    if address is not None and number != 0:
        _wait_for_first_process(address, timeout)
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
            return  # a TPU host outside of any cluster
        raise TransientError(
            f"the processes of the run cannot connect: {str(error).splitlines()[0].rstrip('.')}. Each needs the same "
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, and a JAX_PROCESS_ID of its own. Start all of them again; "
            "if they are set correctly, raise config.processes.timeout_seconds; for one process, set "
            "config.processes.count=1."
        ) from None


def _wait_for_first_process(address: str, timeout: float) -> None:
    """Waits until the first process accepts connections; without it, JAX would abort this process.

    Args:
      address: host:port of the first process.
      timeout: of the wait, in seconds.

    Raises:
      TransientError: it does not accept any.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, ValueError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"the first process does not answer at JAX_COORDINATOR_ADDRESS={address} ({error}). All processes "
                    f"are needed; this one waited {timeout:g} s. Start all again; if the first one needs longer to "
                    "start, raise config.processes.timeout_seconds."
                ) from None
            time.sleep(0.2)


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
    """Whether JAX can detect the processes."""
    # A batch script that calls Python without srun has a rank but no step.
    in_slurm_step = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")) and importlib.util.find_spec("libtpu")
    return in_slurm_step or bool(has_tpu)


def is_first() -> bool:
    """Whether this process is the one that writes files and messages."""
    return num_processes() == 1 or jax.process_index() == 0


def num_processes() -> int:
    """Number of processes of the run; uses no device if there is only one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def call_on_all(function: Callable[[], T]) -> T:
    """Calls the function and waits until all processes have called it; if it fails on one, it raises on all.

    The process that fails raises at once, the others when they reach this call.

    Raises:
      ConfigError: the function's own, or another process has failed.
      TransientError: likewise, if running the same command again may help.
    """
    try:
        result = function()
    except BaseException as error:
        if num_processes() > 1:
            _put(_FAILED_FOR_NOW if isinstance(error, TransientError) else _FAILED)
        raise
    for number, word in enumerate(exchange_text("done")):
        if word != "done":
            kind = TransientError if word == _FAILED_FOR_NOW else ConfigError
            raise kind(
                f"process {number} of {num_processes()} has failed. All processes are needed. See its own message."
            )
    return result


def on_first(function: Callable[[], T]) -> T | None:
    """What the function returns on the first process, which alone calls it; None on the others, which wait for it.

    Raises:
      ConfigError: as `call_on_all`.
      TransientError: likewise.
    """
    return call_on_all(lambda: function() if is_first() else None)


def exchange_text(word: str) -> list[str]:
    """Sends a word to all processes, and waits without a time limit for theirs.

    Uses no device, because collectives time out when one process takes much longer than the others.

    Returns:
      One word for each process, in order.
    """
    if num_processes() == 1:
        return [word]
    turn = _put(word)
    return [_get(turn, number) for number in range(num_processes())]


def _put(word: str) -> int:
    turn = next(_TURNS)
    _service().key_value_set(f"kto_jax/{turn}/{jax.process_index()}", word)
    return turn


def _get(turn: int, number: int) -> str:
    while True:
        try:
            # In short waits, so that signals are handled.
            return _service().blocking_key_value_get(f"kto_jax/{turn}/{number}", 2000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _service() -> Any:
    return distributed.global_state.client


def any_was_told_to_stop() -> bool:
    """Whether any process of several has received SIGTERM by now, which JAX's preemption service takes; does not wait.

    Processes see this within a second of each other, not at the same call.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such notice
        return bool(_service().key_value_try_get(_NOTICE))
    return False


def broadcast_bool(value: bool) -> bool:
    """The first process's value, on all processes, once all have called this."""
    return exchange_text(str(value))[0] == "True"


def broadcast_int(value: int) -> int:
    """The first process's number, on all processes; the first does not wait for the others."""
    if num_processes() == 1:
        return value
    if is_first():
        _put(str(value))
        return value
    return int(_get(next(_TURNS), 0))


@contextlib.contextmanager
def exit_if_one_is_lost(exit_code: int, timeout: float) -> Iterator[None]:
    """Ends this process at once if an error inside the context was caused by the death of another process.

    A collective fails on every process when one of them dies. A clean exit would wait for the dead process in JAX's
    shutdown and in Orbax's barriers.

    Two cases raise no error: a process that waits for an accelerator, and a lost first process. JAX's service then
    aborts the process with SIGABRT after the heartbeat timeout. In jaxlib 0.10.2 to 0.12.0 Python cannot prevent that
    (`missed_heartbeat_callback` fails with std::bad_cast). Launch scripts restart after SIGABRT too.

    Args:
      exit_code: the exit code.
      timeout: seconds without an answer after which a process counts as lost; less than the heartbeat timeout.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not isinstance(error, ConfigError) and num_processes() > 1 and (lost := _unresponsive(timeout)):
            text = f"error: process {lost[0]} of {num_processes()} is lost ({str(error).splitlines()[0]}). "
            print(f"{text}All processes are needed. Run the same command again to resume.", file=sys.stderr, flush=True)
            os._exit(exit_code)
        raise


def _unresponsive(timeout: float) -> list[int]:
    """The processes that do not also call this within the timeout, in seconds."""
    service, lost = _service(), []
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        service.key_value_set(f"kto_jax/alive/{jax.process_index()}", "")
    deadline = time.monotonic() + timeout
    for number in range(num_processes()):
        try:
            left = max(deadline - time.monotonic(), 1.0)  # for an answer over a busy network
            service.blocking_key_value_get(f"kto_jax/alive/{number}", int(1000 * left))
        except jax.errors.JaxRuntimeError:
            lost.append(number)
    return lost


def any_process(mask: np.ndarray) -> np.ndarray:
    """Where any process's mask is set; all masks have the same shape."""
    if num_processes() == 1:
        return mask
    return np.any(multihost_utils.process_allgather(mask), axis=0)


def gather(tree: Any) -> Any:
    """Arrays sharded over all devices, as NumPy arrays on every process."""
    if num_processes() == 1:
        return jax.device_get(tree)
    return jax.tree.map(gather_array, tree)
