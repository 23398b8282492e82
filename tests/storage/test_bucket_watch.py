"""A process that waits for its bucket in vain ends."""

import threading
import types

import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage import bucket_watch
from kto_jax.storage.bucket_watch import BucketWatch


class Waiting:
    """A watch with a clock that the test moves; `codes` has what the process would end with."""

    def __init__(self, monkeypatch):
        self.now, self.codes, self.error, self.stopping = 1000.0, [], None, False
        monkeypatch.setattr(bucket_watch, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        threads = types.SimpleNamespace(Thread=lambda target, **_: types.SimpleNamespace(start=target))
        monkeypatch.setattr(bucket_watch, "threading", threads)
        self.watch = BucketWatch("gs://a/b", self.ask, lambda: self.stopping, self.codes.append)

    def ask(self):
        if self.error:
            raise self.error

    def after(self, seconds):
        self.now += seconds
        self.watch.check()
        return self.codes


@pytest.fixture
def waiting(monkeypatch):
    return Waiting(monkeypatch)


def test_a_bucket_that_stays_silent_ends_the_process_so_that_it_is_started_again(waiting, capsys):
    waiting.error = TransientError("away")
    assert waiting.after(899) == []
    with pytest.raises(TransientError):
        waiting.watch.ask()
    assert waiting.after(2) == [75]
    assert "error: gs://a/b has not answered for 901 s. What" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, ConfigError("forbidden")])
def test_any_answer_starts_the_time_again(waiting, error):
    waiting.error = error
    waiting.after(899)
    try:
        waiting.watch.ask()
    except ConfigError as raised:
        assert raised is error
    assert waiting.after(899) == []
    assert waiting.after(2) == [75]


def test_after_a_signal_the_process_waits_20_s_for_an_answer(waiting, capsys):
    waiting.error = TransientError("away")
    waiting.after(500)
    waiting.stopping = True
    assert waiting.after(100) == [] and waiting.after(20) == []
    assert waiting.after(1) == [75]
    assert "for 21 s after a signal to stop" in capsys.readouterr().err


def test_after_a_signal_a_process_whose_bucket_answers_goes_on_saving(waiting):
    waiting.stopping = True
    for _ in range(100):
        assert waiting.after(10) == []


def test_after_a_signal_the_bucket_is_asked_every_5_s(waiting):
    asked = []
    waiting.watch._ask = lambda: asked.append(waiting.now)
    waiting.stopping = True
    for _ in range(12):
        waiting.after(1)
    assert asked == [1001, 1006, 1011]


def test_the_real_thread_is_no_reason_to_stay_alive(monkeypatch):
    asked = threading.Event()
    watch = BucketWatch("gs://a/b", asked.set, lambda: True, pytest.fail)
    watch.check()
    assert asked.wait(100)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "asks the bucket")
