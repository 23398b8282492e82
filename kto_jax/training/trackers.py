"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, chosen by config.trackers.

Each gets the metrics of every step as train/NAME, those of an evaluation as eval/NAME, and the configuration. A resumed
run continues the same W&B or MLflow run, whose id is stored in the run's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kto_jax.config import Config, ConfigError, to_dict
from kto_jax.config.packages import require

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_LONGEST_PARAM = 500
"""Maximum length of a parameter that every MLflow server accepts, in characters."""


class Tracker(Protocol):
    """A destination of metrics besides metrics.jsonl."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Records the metrics of a step, all finite, by grouped name."""

    def close(self, *, finished: bool) -> None:
        """Ends the tracker's run; `finished` says whether all steps were taken."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Checks that the package of every tracker is installed; imports none.

    Raises:
      ConfigError: naming the tracker and the command that installs it.
    """
    for name in names:
        require(_PACKAGES[name], f"the tracker {name!r} of config.trackers", f"remove {name!r} from config.trackers")


def open_trackers(config: Config, folder: Path, first_step: int) -> list[Tracker]:
    """Opens the trackers of a run.

    Args:
      config: the run.
      folder: the run's folder.
      first_step: steps already taken.

    Raises:
      ConfigError: a tracker refuses to open.
    """
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
    opened: list[Tracker] = []
    for name in config.trackers:
        try:
            opened.append(kinds[name](config, folder, first_step))
        except Exception as error:  # Clients raise anything: no login, no server, a broken store.
            raise ConfigError(
                f"the tracker {name!r} of config.trackers cannot be opened: {type(error).__name__}: {error}. It needs "
                f"what its client needs. Provide that, or remove {name!r} from config.trackers."
            ) from error
    return opened


def group_names(figures: Mapping[str, float]) -> dict[str, float]:
    """The metrics under grouped names: eval_loss becomes eval/loss, loss becomes train/loss."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in figures.items()
    }


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        # Metrics beyond the first step were left by a killed run.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        shown = {"train/loss": 0.0, "eval/loss": 0.0}
        for summary in hparams(flatten(to_dict(config)), shown):
            self._writer.file_writer.add_summary(summary)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its client reads WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        import wandb

        known = _read_id(folder / "wandb.json")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kto_jax"),
            name=folder.resolve().name,
            dir=folder,
            config=to_dict(config),
            id=known.get("id"),
            resume="allow",
        )
        (folder / "wandb.json").write_text(json.dumps({"id": self._run.id}) + "\n")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(figures), step=step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow; it reads MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME from the environment."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        known = _read_id(folder / "mlflow.json")
        if known:
            self._id = known["id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(self._experiment(), run_name=folder.resolve().name).info.run_id
        (folder / "mlflow.json").write_text(json.dumps({"id": self._id}) + "\n")
        for name, value in flatten(to_dict(config)).items():
            self._client.log_param(self._id, name, str(value)[:_LONGEST_PARAM])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "kto_jax")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker`."""
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


def _read_id(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Flattens a nested configuration to dotted names; values other than numbers, booleans and text become text."""
    result: dict[str, str | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            result |= flatten(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return result
