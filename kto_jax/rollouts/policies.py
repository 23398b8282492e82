"""The policies and references of the rounds, opened to sample from and to measure: on one device, or over the mesh."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from kto_jax.config import Config, ConfigError
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.prompts import rendering_of
from kto_jax.data.tokens.tokenizer import tokenizing_worker
from kto_jax.devices import processes
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.model import Model
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.sampling.complete import LanguageModel
from kto_jax.storage.folders import scratch_folder


@dataclasses.dataclass(frozen=True)
class Policies:
    """Opens models for a run.

    Attributes:
      config: the run.
      mesh: the devices that hold a model, and sample together; None for one device of the first process.
    """

    config: Config
    mesh: Mesh | None

    @property
    def works_here(self) -> bool:
        """Whether this process samples and measures: all do over a mesh, else the first."""
        return self.mesh is not None or processes.is_first()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[LanguageModel]:
        """Opens a model; its parameters are read when they are first needed.

        Args:
          path: whatever a run may start from, such as an exported policy.

        Raises:
          ConfigError: nothing that can be loaded is there.
          TransientError: the Hub cannot be reached.
        """
        config, mesh = self.config, self.mesh
        data, dtype = config.data, config.model.dtype
        files = find_model(path, config.model.base if path == config.model.path else "")
        if is_reward_model(files):
            raise ConfigError(
                f"{files} is a reward model, which scores completions and writes none. A language model is needed. "
                "Set config.model.path."
            )
        settings = (config.model.attention, config.model.reduce_dtype, config.model.keep_logits)
        own: Any = {} if mesh is None else {"layout": make_layout(mesh, *settings)}
        model = Model.create(read_config(files.weights), dtype=dtype, remat="none", **own)
        layout = None
        if mesh is not None:
            layout = shardings(mesh, model.logical_axes(dtype), model.abstract_params(dtype))
        with scratch_folder() as scratch, tokenizing_worker() as workers:
            tokenizer = prepare_tokenizer(
                files.tokenizer,
                scratch / "tokenizer",
                chat_template=data.chat_template,
                eos_token=data.eos_token,
                rendering=rendering_of(data),
                workers=workers,
            )
            load = lambda: load_params(model, files, param_dtype=dtype, shardings=layout)  # noqa: E731
            yield LanguageModel(model, tokenizer, load, workers)


def open_policies(config: Config, devices: str) -> Policies:
    """Decides where models are sampled from.

    Args:
      config: the run.
      devices: "first", "mesh", or "auto": the mesh if there are several devices that are no CPUs.
    """
    if devices == "auto":
        devices = "mesh" if jax.device_count() > 1 and jax.devices()[0].platform != "cpu" else "first"
    return Policies(config, make_mesh(config.mesh, jax.devices()) if devices == "mesh" else None)
