"""Signals: acknowledged at once, deferred during the steps, and a second Ctrl-C ends the process at once."""

import signal
import subprocess
import sys
import threading
import types

import jax
import pytest

from kto_jax.training import preemption
from kto_jax.training.preemption import Preemption
from tests import ROOT

# The main thread is in a C function that does not return to Python, as in compiled code; the listener answers.
STUCK = """
import ctypes
from kto_jax.training.preemption import Preemption
with Preemption() as preemption, preemption.deferred():
    print("ready", flush=True)
    left = 60
    while left:
        # Python's handlers run only when this returns to the interpreter; a signal interrupts it early.
        left = ctypes.CDLL(None).sleep(left)
"""


def start(script):
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def test_ctrl_c_is_answered_while_the_main_thread_waits_and_a_second_one_ends_at_once():
    with start(STUCK) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping after this step; press again to stop now\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "stopped at once\n"


def test_outside_the_steps_ctrl_c_ends_the_process_with_a_message(capfd):
    with pytest.raises(KeyboardInterrupt), Preemption():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "stopping; press again to stop now\n"


def test_outside_the_steps_sigterm_ends_the_process_with_75():
    with pytest.raises(SystemExit) as ended, Preemption():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 75


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_during_the_steps_a_signal_is_remembered(number, code):
    with Preemption() as asked, asked.deferred():
        assert not asked.requested()
        signal.raise_signal(number)
        assert asked.requested()
        assert asked.exit_code == code


def test_a_process_under_nohup_continues_when_its_terminal_closes():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as asked, asked.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert not asked.requested()
    finally:
        signal.signal(signal.SIGHUP, former)


def test_with_several_processes_sighup_is_passed_on_as_sigterm(monkeypatch):
    monkeypatch.setattr(preemption, "_several_processes", lambda: True)
    sent = []
    monkeypatch.setattr(preemption.os, "kill", lambda process, number: sent.append(number))
    with Preemption() as asked, asked.deferred():
        signal.raise_signal(signal.SIGHUP)
    assert sent == [signal.SIGTERM]


def test_the_previous_handlers_and_threads_are_restored():
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with Preemption(), Preemption():
        pass
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("told", [True, False])
def test_with_several_processes_a_signal_to_any_of_them_is_seen(told, monkeypatch):
    def try_get(key):
        if not told:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return "2026-01-01T00:00:00+00:00"

    service = types.SimpleNamespace(key_value_try_get=try_get)
    monkeypatch.setattr(preemption.processes, "_service", lambda: service)
    assert not Preemption().was_signalled()
    monkeypatch.setattr(preemption, "_several_processes", lambda: True)
    assert Preemption().was_signalled() == told


def test_calls_of_the_preemption_service_are_numbered_without_gaps_over_a_processs_life(monkeypatch):
    asked = []
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", asked.append)
    monkeypatch.setattr(preemption, "_several_processes", lambda: True)
    preemption.reached_sync_point()  # as precompute does
    for _ in range(2):  # two loops of one process
        handler = Preemption()
        handler.requested()
        handler.requested()
    assert asked == list(range(asked[0], asked[0] + 5))
