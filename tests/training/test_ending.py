"""How a command ends its process: with its own code, at once after a failed write, and also by SIGTERM."""

import os
import signal
import subprocess
import sys

import pytest

from kto_jax.training import ending
from tests import ROOT


class EndedError(Exception):
    """The process has ended at once, with the code of this error."""


@pytest.fixture
def run(monkeypatch):
    """Runs a command to its end; returns the exit code, and whether the process ended without waiting for threads."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ending, "_failed_writes", [])
    monkeypatch.setattr(ending, "_decided", [])  # or Python would end these tests with the last code

    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(ending.os, "_exit", end)

    def run(main):
        with pytest.raises((SystemExit, EndedError)) as ended:
            ending.run_to_end(main)
        return ended.value.args[0], ended.type is EndedError

    yield run
    signal.signal(signal.SIGTERM, handler)


def exit_with(code):
    raise SystemExit(code)


@pytest.mark.parametrize("main, code", [
    (lambda: 0, 0), (lambda: 75, 75), (lambda: exit_with(130), 130), (lambda: exit_with(None), 0),
])  # fmt: skip
def test_a_command_ends_with_the_code_that_it_returns_or_exits_with(run, main, code):
    assert run(main) == (code, False)


def test_python_ends_with_the_decided_code_once_its_callbacks_have_run(run):
    ending._end()  # nothing is decided
    run(lambda: 75)
    with pytest.raises(EndedError, match="75"):
        ending._end()


def test_after_a_failed_write_a_command_waits_for_no_thread(run):
    def main():
        ending.note_failed_write()
        return 1

    assert run(main) == (1, True)


def test_an_unexpected_error_after_a_failed_write_is_shown_before_the_process_ends(run, capsys):
    def main():
        ending.note_failed_write()
        raise RuntimeError("the writer is gone")

    assert run(main) == (1, True)
    assert capsys.readouterr().err.endswith("RuntimeError: the writer is gone\n")


def test_any_other_unexpected_error_is_pythons_to_report(run):
    with pytest.raises(ZeroDivisionError):
        ending.run_to_end(lambda: 1 // 0)


def test_a_sigterm_after_the_end_does_not_change_the_code(run):
    assert run(lambda: 2) == (2, False)
    with pytest.raises(EndedError, match="2"):
        os.kill(os.getpid(), signal.SIGTERM)


LATE = """
import os, signal, sys
from kto_jax.training.ending import run_to_end

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

late = Late()  # freed when Python takes modules apart
run_to_end(lambda: {code})
"""


@pytest.mark.parametrize("result, code", [("75", 75), ("0", 0), ("1 // 0", 1)])
def test_a_sigterm_while_python_takes_itself_apart_does_not_change_the_code(result, code):
    command = [sys.executable, "-c", LATE.format(code=result)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code and ("ZeroDivisionError" in ended.stderr) == (result == "1 // 0")
