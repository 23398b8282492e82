"""Actions that a thread repeats."""

import threading

import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage import repeated as module
from kto_jax.storage.repeated import repeated

WAIT = 100
"""Seconds after which an event that never comes fails a test."""


@pytest.mark.parametrize("error", [ConfigError("no"), TransientError("not now")])
def test_an_action_is_repeated_after_it_has_failed(error):
    errors, done, calls = [], threading.Event(), []

    def act():
        calls.append(1)
        if len(calls) < 3:
            raise error
        done.set()

    with repeated(0, act, name="acts", failed=errors.append):
        assert done.wait(WAIT)
    after = len(calls)
    assert errors == [error, error]
    assert after == len(calls) and not [thread for thread in threading.enumerate() if thread.name == "acts"]


def test_an_action_that_hangs_does_not_keep_the_process(monkeypatch):
    monkeypatch.setattr(module, "_LAST_SECONDS", 0)
    began, release = threading.Event(), threading.Event()

    def hang():
        began.set()
        assert release.wait(WAIT)

    with repeated(0, hang, name="hangs", failed=print):
        assert began.wait(WAIT)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "hangs")
    assert thread.daemon
    release.set()
    thread.join(WAIT)
