import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from kto_jax.progress import Messages, make_step_bar, show_progress
from tests import COMPILER_FLAGS, ROOT


def shown(*, terminal, logs=False):
    screen = io.StringIO()
    with show_progress(Messages(file=screen, force_terminal=terminal, width=80), logs=logs) as progress:
        progress.start("reading the model")
        progress.start("completing prompts", total=8)
        progress.advance(3)
    return screen.getvalue()


def test_a_terminal_shows_what_is_being_done_and_how_far_it_is():
    assert "completing prompts" in shown(terminal=True) and "3/8" in shown(terminal=True)


def test_elsewhere_nothing_is_shown_or_a_line_for_each_phase():
    assert shown(terminal=False) == ""
    reading, completing = shown(terminal=False, logs=True).splitlines()
    assert reading.endswith(" reading the model …") and completing.endswith(" completing prompts (8) …")


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("steps", [(7, 16), (12_345, 100_000)])
def test_the_progress_bar_fits_a_narrow_terminal(width, steps):
    now = [0.0]
    shown_on = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = make_step_bar(shown_on)
    bar.get_time = lambda: now[0]
    task = bar.add_task("", total=steps[1], figures="")
    for part in (1, 2):
        now[0] += 1800.0
        figures = "loss 0.4321 margin +0.123 auc 0.61"
        bar.update(task, completed=steps[0] * part // 2, figures=figures)
    page = Console(file=io.StringIO(), width=width, color_system=None)
    page.print(bar.get_renderable())
    (line,) = page.file.getvalue().splitlines()
    assert len(line) <= width
    count, left = f"{steps[0]}/{steps[1]}", r"\d+:\d\d(:\d\d)?( left)?"
    assert re.search(rf"^[━╸╺ ]{{4,}} {count} +{left} {re.escape(figures)}$", line), line
    assert ("left" in line) == (width == 80)


def test_away_from_a_terminal_a_message_is_one_line_with_the_time():
    out = io.StringIO()
    messages = Messages(file=out, width=40)
    messages.print("a long message " * 10 + "[with brackets]\nand a second line", style="red")
    (line,) = out.getvalue().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d a long message ", line)
    assert line.endswith("[with brackets] and a second line")


def test_a_phase_is_shown_when_it_begins_and_when_it_ends():
    out = io.StringIO()
    messages = Messages(file=out)
    with messages.phase("reading weights"):
        assert out.getvalue().rstrip().endswith("reading weights …")
    assert re.search(r"reading weights: \d+\.\d s$", out.getvalue().rstrip())


def test_at_a_terminal_a_phase_has_a_spinner_and_no_time():
    out = io.StringIO()
    messages = Messages(file=out, force_terminal=True, width=60, color_system=None)
    with messages.phase("reading weights"):
        pass
    assert "⠋ reading weights …" in out.getvalue()
    assert not re.search(r"\d{4}-\d\d-\d\dT", out.getvalue())


def test_what_is_done_within_a_phase_takes_its_line_and_gives_it_back():
    out = io.StringIO()
    messages = Messages(file=out, force_terminal=True, width=60, color_system=None)
    with messages.phase("reading the feedback"):
        with messages.working("reading rows.jsonl"):
            assert out.getvalue().rpartition("reading")[2].startswith(" rows.jsonl …")
            messages.print("a warning")
            assert out.getvalue().rpartition("reading")[2].startswith(" rows.jsonl …")
        messages.print("another")
        assert out.getvalue().rpartition("reading")[2].startswith(" the feedback …")
    assert out.getvalue().rstrip().endswith("s") and "a warning\n" in out.getvalue()
    assert messages._live is None


def test_a_library_that_draws_its_own_progress_has_the_terminal_for_itself():
    out = io.StringIO()
    messages = Messages(file=out, force_terminal=True, width=60, color_system=None)
    with messages.working("fetching"):
        with messages.aside():
            assert messages._live is None
        assert messages._live is not None


def test_what_goes_into_a_pipe_does_not_turn_up_on_the_terminal(capsys):
    messages = Messages(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with messages.working("judging"):
        print("a verdict")
    assert capsys.readouterr().out == "a verdict\n" and "verdict" not in messages.file.getvalue()


def screen_of(command, columns, cache):
    """The lines on a terminal of so many columns after each redrawing, and the exit code."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "KTO_JAX_CACHE": str(cache), "XLA_FLAGS": COMPILER_FLAGS}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as process:
        os.close(slave)
        parts = []
        while part := _read(master):
            parts.append(part)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()], process.returncode


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux's end of a terminal
        return b""


@pytest.mark.nightly
@pytest.mark.parametrize("columns", [pytest.param(80, marks=pytest.mark.exhaustive), 60])
def test_a_terminal_shows_each_part_of_a_run_and_what_to_do_next(columns, tmp_path):
    run = tmp_path / "run"
    train = [sys.executable, "-m", "kto_jax.train", "--config=configs/tiny.py", f"--workdir={run}"]
    lines, code = screen_of([*train, "--config.max_steps=12"], columns, tmp_path / "cache")
    assert code == 0, lines
    assert lines[0] == "importing JAX …"
    drawn = "\n".join(lines)
    for what in (
        "reading the configuration of the model and the feedback …", "reading tiny_feedback.jsonl",
        "reading weights …", "writing the policy, samples and the report …", "evaluating …", "saving …",
    ):  # fmt: skip
        assert what in drawn, what
    bars = [line for line in lines if "/12 " in line]
    assert all(len(line) <= columns for line in bars)
    assert re.search(r"━ 12/12 +\d\d:\d\d( left)? +loss \d\.\d{4} margin [+-]\d\.\d{3} auc \d\.\d\d$", bars[-1])
    commands = (f"chat --model={run}", f"evaluate --run={run}", f"export --run={run}")
    assert lines[-3:] == [f"next: python -m kto_jax.{command}" for command in commands]
    evaluate = [sys.executable, "-m", "kto_jax.evaluate", f"--run={run}"]
    lines, code = screen_of(evaluate, columns, tmp_path / "cache")
    assert code == 0 and lines[0] == "importing JAX …"
    assert any("measuring step 12 " in line for line in lines), lines
    assert lines[-2:] == [f"next: python -m kto_jax.chat --model={run}", f"next: python -m kto_jax.export --run={run}"]
    generate = [sys.executable, "-m", "kto_jax.generate", f"--model={run}", "--prompt=Hello", "--max_new_tokens=4"]
    lines, code = screen_of(generate, columns, tmp_path / "cache")
    assert code == 0 and lines[-1] == f"next: python -m kto_jax.chat --model={run}"
    # Into a pipe goes what was asked for, and no line is drawn anew.
    piped = subprocess.run([*generate, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert piped.stdout.count("\n") == 1 and "\r" not in piped.stderr and "\x1b" not in piped.stderr
