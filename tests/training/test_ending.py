"""How a command ends its process: with its own code, at once after a failed write, and also by SIGTERM."""

import os
import signal

import pytest

from kto_jax.training import ending


class EndedError(Exception):
    """The process has ended at once, with the code of this error."""


@pytest.fixture
def run(monkeypatch):
    """Runs a command to its end; returns the exit code, and whether the process ended without waiting for threads."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ending, "_failed_writes", [])

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
