"""Where a model is: the weights of a whole model, and the adapters that are added to them, if any."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kto_jax.config import ConfigError
from kto_jax.models.weights.adapter_folder import CONFIG, is_adapter_folder, named_base
from kto_jax.storage.fetch import local_path
from kto_jax.storage.sums import check_export

CONFIG_FILES = ("config.json", CONFIG)
"""What says of a model of the Hub which architecture it has, or which base."""


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
      weights: a Hugging Face directory or a .gguf file.
      adapter: a folder of adapters to add to them; None without.
    """

    weights: Path
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is: with the adapters if they have one of their own."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer.json").is_file()
        return self.adapter if has_own and self.adapter is not None else self.weights

    def __str__(self) -> str:
        return str(self.weights) if self.adapter is None else f"{self.weights} with the adapters of {self.adapter}"


def find_model(path: str, base: str = "", *, hub_files: Sequence[str] | None = None) -> ModelFiles:
    """Makes a model available on this machine.

    Args:
      path: a model, as `local_path` takes it, or a folder of adapters.
      base: the model that the adapters belong to; empty takes the one that they name.
      hub_files: which files of a model of the Hub to fetch; None for all that are read.

    Raises:
      ConfigError: the model or the base does not exist, or `base` is given for a model that has none; or files beside
        the weights differ from the digests of an export (unless only some are fetched).
      TransientError: the Hub cannot be reached.
    """
    files = _find_model(path, base, hub_files)
    if hub_files is None:
        for folder in (files.weights, files.adapter):
            # The settings of a run may be written while it is read.
            if folder is not None and folder.is_dir() and not (folder / "checkpoints").is_dir():
                check_export(folder, weights=False)
    return files


def _find_model(path: str, base: str, hub_files: Sequence[str] | None) -> ModelFiles:
    found = local_path(path, hub_files=hub_files)
    if not is_adapter_folder(found):
        if base:
            raise ConfigError(
                f"a base ({base}) is set for {path}, which is a whole model. Only adapters have a base. Take "
                "config.model.base (config.reference.base) out, or set the path to the folder of the adapters."
            )
        return ModelFiles(found)
    base = base or named_base(found)
    if not base:
        raise ConfigError(
            f"{path} holds adapters, and its {CONFIG} names no base. Adapters are added to the model that they were "
            "trained on. Set config.model.base (config.reference.base), or base_model_name_or_path in that file."
        )
    try:
        weights = local_path(base, hub_files=hub_files)
    except ConfigError as error:
        raise ConfigError(
            f"the base of the adapters in {path} cannot be found: {error} Set config.model.base "
            "(config.reference.base), or base_model_name_or_path in its adapter_config.json."
        ) from error
    if is_adapter_folder(weights):
        raise ConfigError(
            f"the base of the adapters in {path} is {base}, which holds adapters too. The base must be a whole model. "
            "Merge them first (python -m kto_jax.export), and set config.model.base to the merged model."
        )
    return ModelFiles(weights, found)
