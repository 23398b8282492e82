"""A run's output at a terminal and in files."""

import io
import json
import re
import shutil

import pytest
from rich.console import Console

from kto_jax.config import ConfigError
from kto_jax.training.logs import MetricsLog, _Messages, progress_bar, read_metrics


def write(folder, first_step, steps):
    with MetricsLog(folder, first_step, 10) as log:
        for step in steps:
            log.write(step, {"loss": 0.5 / step, "auc": float("nan")})


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsLog(tmp_path, 0, 10) as log:
        log.write(1, {"loss": 0.25})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.25}


@pytest.mark.parametrize("change", [
    lambda folder: shutil.rmtree(folder),
    lambda folder: folder.rename(folder.parent / "elsewhere"),
    lambda folder: (folder / "metrics.jsonl").unlink(),
    lambda folder: shutil.copytree(folder.rename(folder.parent / "elsewhere"), folder),
], ids=["removed", "renamed", "file removed", "replaced"])  # fmt: skip
def test_a_folder_that_is_gone_ends_the_run(tmp_path, change):
    (folder := tmp_path / "run").mkdir()
    with MetricsLog(folder, 0, 10) as log:
        log.write(1, {"loss": 0.25})
        change(folder)
        with pytest.raises(ConfigError, match="was removed, renamed or replaced"):
            log.write(2, {"loss": 0.25})


def test_a_non_finite_figure_becomes_null_and_is_not_shown(tmp_path, capsys):
    write(tmp_path, 0, [1])
    assert "nan" not in capsys.readouterr().err.lower()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "auc": None}]


def test_rows_after_the_checkpoint_and_a_half_written_one_are_dropped_when_a_run_is_resumed(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    write(tmp_path, 2, [3])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_only_the_first_process_writes(tmp_path):
    with MetricsLog(tmp_path, 0, 10, enabled=False) as log:
        log.write(1, {"loss": 0.5})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("steps", [(7, 16), (12_345, 100_000)])
def test_the_progress_bar_fits_a_narrow_terminal(width, steps):
    now = [0.0]
    shown_on = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = progress_bar(shown_on)
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
    messages = _Messages(file=out, width=40, markup=False, highlight=False)
    messages.print("a long message " * 10 + "[with brackets]\nand a second line", style="red")
    (line,) = out.getvalue().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d a long message ", line)
    assert line.endswith("[with brackets] and a second line")


def test_a_phase_is_shown_when_it_begins_and_when_it_ends():
    out = io.StringIO()
    messages = _Messages(file=out, markup=False, highlight=False)
    with messages.phase("reading weights"):
        assert out.getvalue().rstrip().endswith("reading weights …")
    assert re.search(r"reading weights: \d+\.\d s$", out.getvalue().rstrip())


def test_at_a_terminal_a_phase_has_a_spinner_and_no_time():
    out = io.StringIO()
    messages = _Messages(file=out, markup=False, highlight=False, force_terminal=True, width=60, color_system=None)
    with messages.phase("reading weights"):
        pass
    assert "⠋ reading weights …" in out.getvalue()
    assert not re.search(r"\d{4}-\d\d-\d\dT", out.getvalue())
