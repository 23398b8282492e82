import io

from rich.console import Console

from kto_jax.progress import show_progress


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
