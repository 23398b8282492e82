"""The watchdog: late steps are reported with stacks, pauses do not count, and the heartbeat says what goes on."""

import contextlib
import json
import threading
import time
import types

import pytest

from kto_jax.config import WatchConfig
from kto_jax.training.watchdog import Watchdog

WAIT = 100
"""Seconds after which an event that never comes fails a test."""


@pytest.fixture
def hang(tmp_path):
    """Makes a `Hang`, and closes its file."""
    with contextlib.ExitStack() as stack:

        def make(**config):
            made = Hang(tmp_path, **config)
            stack.callback(made.out.close)
            return made

        yield make


class Hang:
    """A watchdog whose process would end; `ended` says with which code."""

    def __init__(self, folder, **config):
        self.codes, self.ended = [], threading.Event()
        self.path = folder / "stderr"
        self.out = self.path.open("a")
        self.heartbeat = folder / "heartbeat.json"
        settings = WatchConfig(**{"stall_factor": 1.0, "stall_seconds": 1e-3, "stall_exit": True} | config)
        self.watchdog = Watchdog(settings, folder, 0, out=self.out, end=self.end)

    def end(self, code):
        self.codes.append(code)
        self.ended.set()

    def text(self):
        return self.path.read_text()


def test_a_late_step_is_reported_with_the_stack_of_every_thread_and_may_end_the_process(hang):
    hang = hang()

    def wait_in_a_thread_of_its_own():
        hang.ended.wait(WAIT)

    other = threading.Thread(target=wait_in_a_thread_of_its_own)
    other.start()
    with hang.watchdog as watchdog:
        for step in (1, 2, 3):
            watchdog.completed(step)
        assert hang.ended.wait(WAIT)
    other.join()
    text = hang.text()
    assert hang.codes == [75]
    assert "warning: process 0 has completed no step for 0 s after step 3; the median of a step is" in text
    assert "in wait_in_a_thread_of_its_own" in text
    assert "in test_a_late_step_is_reported_with_the_stack_of_every_thread_and_may_end_the_process" in text


def test_a_late_step_is_reported_once_and_the_run_goes_on(hang):
    hang = hang(stall_exit=False, heartbeat_seconds=1e-3)
    with hang.watchdog as watchdog:
        for step in (1, 2, 3):
            watchdog.completed(step)
        while "Thread" not in hang.text():
            time.sleep(1e-3)
        before = json.loads(hang.heartbeat.read_text())
        while json.loads(hang.heartbeat.read_text()) == before:  # It would report again by now.
            time.sleep(1e-3)
    assert hang.text().count("has completed no step") == 1
    assert "and goes on waiting" in hang.text()
    assert hang.codes == []


@pytest.mark.parametrize("config, steps", [
    ({"stall_factor": 0.0}, 3),
    ({"stall_seconds": 1e6}, 3),
    ({"stall_factor": 1e9}, 3),
    ({}, 2),  # too few for a median
])  # fmt: skip
def test_a_step_in_time_is_not_reported(hang, config, steps):
    hang = hang(heartbeat_seconds=1e-3, **config)
    with hang.watchdog as watchdog:
        for step in range(1, steps + 1):
            watchdog.completed(step)
        while not hang.heartbeat.exists() or json.loads(hang.heartbeat.read_text())["seconds_since_step"] < 0.1:
            time.sleep(1e-3)
    assert hang.text() == ""


def test_a_pause_is_no_part_of_a_step_and_shown_in_the_heartbeat(hang):
    hang = hang(heartbeat_seconds=1e-3)
    with hang.watchdog as watchdog:
        with watchdog.paused("evaluating"):
            for step in (1, 2, 3):
                watchdog.completed(step)
            while not hang.heartbeat.exists() or json.loads(hang.heartbeat.read_text())["doing"] != "evaluating":
                time.sleep(1e-3)
            while json.loads(hang.heartbeat.read_text())["seconds_since_step"] < 0.1:
                time.sleep(1e-3)
            assert hang.codes == []
        assert hang.ended.wait(WAIT)
    found = json.loads(hang.heartbeat.read_text())
    assert (found["step"], found["doing"]) == (3, "ending")
    assert found.keys() == {"time", "step", "seconds_since_step", "doing", "host", "pid"}


def test_pauses_are_no_part_of_the_median(hang, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kto_jax.training.watchdog.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watchdog = hang(stall_factor=10.0).watchdog
    for _ in range(3):
        with watchdog.paused("saving"):
            now[0] += 100
        now[0] += 2
        watchdog.completed(1)
    assert watchdog._late_at() == now[0] + 10 * 2


def test_a_heartbeat_that_cannot_be_written_is_reported_and_stops(hang, tmp_path):
    hang = hang(heartbeat_seconds=1e-3, stall_factor=0.0)
    hang.watchdog._heartbeat = tmp_path / "gone" / "heartbeat.json"
    with hang.watchdog:
        while "no further heartbeat" not in hang.text():
            time.sleep(1e-3)
    assert hang.text().count("\n") == 1


def test_none_is_written_if_none_is_configured(hang, tmp_path):
    with hang(heartbeat_seconds=0.0, stall_factor=0.0).watchdog:
        pass
    assert not (tmp_path / "heartbeat.json").exists()
