"""What all processes of a run must have in common, compared before they compute anything together.

Processes that differ in a batch, a seed or a weight either abort in a collective, or train to the end on numbers that
belong to no run.
"""

from __future__ import annotations

import importlib.metadata
import json
import operator
from collections.abc import Mapping
from pathlib import Path

from kto_jax.config import Config, ConfigError
from kto_jax.config.resolve import fields_of
from kto_jax.devices import processes
from kto_jax.models.weights.model_files import ModelFiles
from kto_jax.training.inputs import Inputs

_PATHS = ("model.path", "model.base", "reference.path", "reference.base", "data.train", "data.eval")
"""Hosts may keep the same files in different folders: `compare_inputs` compares their content."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_MOST_SHOWN = 5


def compare_config(config: Config) -> None:
    """Checks that all processes have the same settings and packages; every process must call this.

    Raises:
      ConfigError: on all processes; names what differs, and where.
    """
    settings = {f"config.{name}": repr(operator.attrgetter(name)(config)) for name, _, _ in fields_of()}
    packages = {f"the version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    _compare({name: value for name, value in settings.items() if name.removeprefix("config.") not in _PATHS} | packages)


def compare_inputs(inputs: Inputs) -> None:
    """Checks that all processes read the same feedback and the same models; every process must call this.

    Weights are compared by the names and sizes of their files, because hashing those of a large model takes minutes.

    Raises:
      ConfigError: on all processes; names what differs, and where.
    """
    _compare(
        {
            "the feedback (config.data.train, config.data.eval)": inputs.index.manifest["content_sha256"],
            "the number of steps": str(inputs.num_steps),
            "the architecture (config.model.path)": repr(inputs.architecture),
            "the policy's files (config.model.path)": _describe(inputs.policy_files),
            "the reference's files (config.reference.path)": _describe(inputs.reference_files),
        }
    )


def _describe(files: ModelFiles) -> str:
    """Names and sizes of a model's weight files."""
    folders = [folder for folder in (files.weights, files.adapter) if folder is not None]
    found = [path for folder in folders for path in _weight_files(folder)]
    return ", ".join(f"{path.name} of {path.stat().st_size} bytes" for path in found)


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _compare(mine: Mapping[str, str]) -> None:
    first, *others = (json.loads(word) for word in processes.exchange_text(json.dumps(mine)))
    differences = [
        f"{name} is {theirs[name]} on process {number} and {value} on process 0"
        for number, theirs in enumerate(others, start=1)
        for name, value in first.items()
        if theirs[name] != value
    ]
    if differences:
        more = len(differences) - _MOST_SHOWN
        raise ConfigError(
            f"the processes of this run differ: {'; '.join(differences[:_MOST_SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}. All need the same settings, packages, feedback and models. "
            "Start every process with the same command and the same files."
        )
