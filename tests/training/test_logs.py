import json

from kto_jax.training.logs import MetricsLog, read_metrics


def write(workdir, first_step, steps):
    log = MetricsLog(workdir, first_step=first_step, num_steps=10, enabled=True)
    for step in steps:
        log.write(step, {"loss": 0.5 / step, "auc": float("nan")})
    log.close()


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, first_step=0, num_steps=10, enabled=True)
    log.write(1, {"loss": 0.25})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.25}
    log.close()


def test_what_is_not_finite_becomes_null_and_is_shown_to_nobody(tmp_path, capsys):
    write(tmp_path, 0, [1])
    assert "nan" not in capsys.readouterr().err.lower()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "auc": None}]


def test_rows_after_the_checkpoint_and_a_half_written_one_are_dropped_when_a_run_continues(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    write(tmp_path, 2, [3])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_gets_the_same_figures(tmp_path):
    write(tmp_path, 0, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_other_processes_than_the_first_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, first_step=0, num_steps=10, enabled=False)
    log.write(1, {"loss": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []
