"""Experiment trackers: what they receive, and that a resumed run continues the same tracked run."""

import dataclasses
import importlib.util
import json

import pytest

from kto_jax.config import Config, ConfigError
from kto_jax.training.logs import MetricsLog
from kto_jax.training.trackers import check_trackers, flatten, group_names, open_trackers

ROW = {"loss": 0.5, "auc": float("nan"), "eval_loss": 0.25}


def log_rows(folder, tracker, steps, num_steps=4):
    config = dataclasses.replace(Config(), trackers=(tracker,))
    first = steps[0] - 1
    with MetricsLog(folder, first, num_steps, trackers=open_trackers(config, folder, first)) as log:
        for step in steps:
            log.write(step, ROW)


def test_names_are_grouped_by_training_and_evaluation():
    assert group_names({"loss": 1, "eval_loss": 2, "mfu": 3}) == {"train/loss": 1, "eval/loss": 2, "train/mfu": 3}


def test_a_configuration_is_flattened_to_values_that_trackers_accept():
    assert flatten({"a": 1, "b": {"c": True, "d": {}}, "e": ("x",), "f": None}) == {
        "a": 1, "b.c": True, "b.d": "{}", "e": "('x',)", "f": "None",
    }  # fmt: skip


def test_a_tracker_without_its_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package wandb, which is not installed\..*Run pip install wandb, or remove"
    ):
        check_trackers(("wandb",))


def events(folder):
    """The summaries of all event files: (tag, step, value or None)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format that is read below)

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            found += [(value.tag, event.step, value) for value in event.summary.value]
    return found


def test_tensorboard_gets_groups_and_hyperparameters(tmp_path):
    log_rows(tmp_path, "tensorboard", [1, 2])
    found = events(tmp_path)
    scalars = [(tag, step, value.simple_value) for tag, step, value in found if "/" in tag and "hparams" not in tag]
    assert scalars == [("train/loss", 1, 0.5), ("eval/loss", 1, 0.25), ("train/loss", 2, 0.5), ("eval/loss", 2, 0.25)]
    hyperparameters = b"".join(value.metadata.plugin_data.content for tag, _, value in found if "hparams" in tag)
    assert b"optimizer.learning_rate" in hyperparameters


def test_wandb_keeps_a_run_offline_and_continues_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    log_rows(tmp_path, "wandb", [1, 2])
    log_rows(tmp_path, "wandb", [3, 4])
    wandb.teardown()  # Its service has written everything when it ends, as at process exit.
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert all(path.name == f"run-{identity}.wandb" for path in files)
    for path in files:
        assert b"train/loss" in path.read_bytes()
        assert b"eval/loss" in path.read_bytes()


def test_mlflow_keeps_a_run_in_a_local_store_and_continues_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_rows(tmp_path, "mlflow", [1, 2])
    client = mlflow.MlflowClient()
    identity = json.loads((tmp_path / "mlflow.json").read_text())["id"]
    assert client.get_run(identity).info.status == "KILLED"  # two of four steps
    log_rows(tmp_path, "mlflow", [3, 4])
    run = client.get_run(identity)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "5e-06"
    assert [(metric.step, metric.value) for metric in client.get_metric_history(identity, "train/loss")] == [
        (step, 0.5) for step in (1, 2, 3, 4)
    ]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_tracker_that_fails_is_dropped_with_a_warning_and_logging_continues(tmp_path, capsys):
    class Broken:
        def log(self, step, figures):
            raise OSError("no server")

        def close(self, *, finished):
            raise AssertionError("it was dropped")

    with MetricsLog(tmp_path, 0, 2, trackers=[Broken()]) as log:
        log.write(1, ROW)
        log.write(2, ROW)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("tracker Broken failed and gets no more metrics (no server)") == 1


def test_a_tracker_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.SummaryWriter", broken)
    with pytest.raises(ConfigError, match=r"'tensorboard' of config\.trackers cannot be opened: OSError: disk full"):
        log_rows(tmp_path, "tensorboard", [1])


def broken(*arguments, **options):
    raise OSError("disk full")
