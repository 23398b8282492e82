"""Processes that tokenize, and one that is killed."""

import os
import signal

import pytest

from kto_jax.config import TransientError
from kto_jax.data.workers import Workers


def end_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise KeyError("no worker was killed")


def test_a_killed_worker_is_a_failure_that_running_again_may_cure():
    message = r"a worker process was killed .* Run the same command again"
    with pytest.raises(TransientError, match=message), Workers(1) as workers:
        workers.submit(end_itself).result()


def test_what_a_function_raises_in_a_worker_is_raised_as_it_is():
    with pytest.raises(KeyError, match="no worker was killed"), Workers(1) as workers:
        workers.submit(fail).result()
