import io

import jax
from rich.console import Console

from kto_jax.progress import report_unused_devices, show_progress


def shown(*, terminal):
    screen = io.StringIO()
    with show_progress(Console(file=screen, force_terminal=terminal, width=80)) as progress:
        progress.start("reading the model")
        progress.start("completing prompts", total=8)
        progress.advance(3)
    return screen.getvalue()


def test_a_terminal_shows_what_is_being_done_and_how_far_it_is():
    assert "completing prompts" in shown(terminal=True) and "3/8" in shown(terminal=True)


def test_elsewhere_nothing_is_shown():
    assert shown(terminal=False) == ""


def test_a_command_reports_that_it_uses_one_of_several_devices(capsys, monkeypatch):
    report_unused_devices()
    assert capsys.readouterr().err == "uses 1 of 8 devices\n"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    report_unused_devices()
    assert capsys.readouterr().err == ""
