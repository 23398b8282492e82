"""A run's output at a terminal and in files."""

import json
import shutil

import pytest

from kto_jax.config import ConfigError
from kto_jax.training.logs import MetricsLog, read_metrics


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
