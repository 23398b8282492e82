"""The policies and references of the rounds, to sample from and to measure: on one device, or over the mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from kto_jax.config import Config, ConfigError, MeshConfig
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.prompts import rendering_of
from kto_jax.data.tokens.tokenizer import tokenizing_worker
from kto_jax.devices import processes
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.sampling.complete import LanguageModel
from kto_jax.storage.folders import scratch_folder
from kto_jax.training.kept import Kept
from kto_jax.training.stored_policy import read_architecture


@dataclasses.dataclass(frozen=True)
class Policies:
    """Opens models for a run.

    Attributes:
      config: the run.
      mesh: the devices that hold a model, and sample together; None for one device of the first process.
      kept: the policy that the last round ended with.
    """

    config: Config
    mesh: Mesh | None
    kept: Kept

    @property
    def works_here(self) -> bool:
        """Whether this process samples and measures: all do over a mesh, else the first."""
        return self.mesh is not None or processes.is_first()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[LanguageModel | None]:
        """Opens a model; its parameters are read when they are first needed, those of the initial one once in a run.

        Args:
          path: whatever a run may start from, such as an exported policy.

        Yields:
          The model; None on a process that does not sample.

        Raises:
          ConfigError: nothing that can be loaded is there.
          TransientError: the Hub cannot be reached.
        """
        if not self.works_here:
            yield None
            return
        files = find_model(path, self._base_of(path))
        with self._opened(self._model_at(path), files.tokenizer, lambda: self._params_at(path)) as opened:
            yield opened

    @contextlib.contextmanager
    def open_last(self, run: Path) -> Iterator[LanguageModel | None]:
        """Opens the policy that a round ended with, from memory; every process must call this. See `open`."""
        load = self._load_last(run)
        if not self.works_here:
            yield None
            return
        with self._opened(self._model(read_architecture(run)), run / "tokenizer", load) as opened:
            yield opened

    def read(self, path: str) -> Callable[[], tuple[Model, Params]]:
        """What reads a model and its parameters, on a process that works here."""
        return lambda: (self._model_at(path), self._params_at(path))

    def read_last(self, run: Path) -> Callable[[], tuple[Model, Params]]:
        """What takes the policy that a round ended with, likewise; every process must call this."""
        load = self._load_last(run)
        return lambda: (self._model(read_architecture(run)), load())

    def value_head(self, run: Path) -> Params:
        """The value head that a round ended with, and its own trunk if it has one; every process must call this."""
        head = dict(self.kept.ended(run).state.policy[SCALAR_HEAD])
        if self.mesh is None:
            head = jax.device_put(processes.gather(head), SingleDeviceSharding(jax.local_devices()[0]))
        tower = {TOWER: self._placed(head.pop(TOWER))} if TOWER in head else {}
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), head) | tower

    def _load_last(self, run: Path) -> Callable[[], Params]:
        def last() -> Params:
            policy = self.kept.ended(run).state.policy
            return {name: part for name, part in policy.items() if name != SCALAR_HEAD}

        if self.mesh is None and processes.num_processes() > 1:
            whole = processes.gather(last())
            return lambda: self._placed(whole)
        return lambda: self._placed(last())

    def _placed(self, params: Params) -> Params:
        """Parameters in the dtype and on the devices that sample."""
        dtype, one = self.config.model.dtype, SingleDeviceSharding(jax.local_devices()[0])
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        # Training shards them over the same mesh in the same way.
        return cast if self.mesh is not None else jax.device_put(cast, one)

    @functools.cached_property
    def _initial(self) -> Params:
        """Parameters of the model that the first round starts from, which all rounds measure."""
        return self._read(self.config.model.path)

    def forget_initial(self) -> None:
        """Frees the initial model, which no later round measures."""
        self.__dict__.pop("_initial", None)

    def _params_at(self, path: str) -> Params:
        """Parameters of a model."""
        return self._initial if path == self.config.model.path else self._read(path)

    def _read(self, path: str) -> Params:
        model, layout, dtype = self._model_at(path), None, self.config.model.dtype
        if self.mesh is not None:
            layout = shardings(self.mesh, model.logical_axes(dtype), model.abstract_params(dtype))
        return load_params(model, find_model(path, self._base_of(path)), param_dtype=dtype, shardings=layout)

    def _model_at(self, path: str) -> Model:
        """The model at a path.

        Raises:
          ConfigError: it is a reward model.
        """
        files = find_model(path, self._base_of(path))
        if is_reward_model(files):
            raise ConfigError(
                f"{files} is a reward model, which scores completions and writes none. A language model is needed. "
                "Set config.model.path."
            )
        return self._model(read_config(files.weights))

    def _base_of(self, path: str) -> str:
        return self.config.model.base if path == self.config.model.path else ""

    def _model(self, architecture: TransformerConfig) -> Model:
        config = self.config.model
        settings = (config.attention, config.reduce_dtype, config.keep_logits)
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if self.mesh is None else self.mesh
        return _create(architecture, config.dtype, layout=make_layout(mesh, *settings))

    @contextlib.contextmanager
    def _opened(self, model: Model, tokenizer: Path, load: Callable[[], Params]) -> Iterator[LanguageModel]:
        data = self.config.data
        with scratch_folder() as scratch, tokenizing_worker() as workers:
            prepared = prepare_tokenizer(
                tokenizer,
                scratch / "tokenizer",
                chat_template=data.chat_template,
                eos_token=data.eos_token,
                rendering=rendering_of(data),
                workers=workers,
            )
            yield LanguageModel(model, prepared, load, workers)


@functools.lru_cache(maxsize=4)
def _create(architecture: TransformerConfig, dtype: str, **own: Any) -> Model:
    """The model, whose structure takes a while to trace."""
    return Model.create(architecture, dtype=dtype, remat="none", **own)


def open_policies(config: Config, devices: str, kept: Kept) -> Policies:
    """Decides where models are sampled from.

    Args:
      config: the run.
      devices: "first", "mesh", or "auto": the mesh if there are several devices that are no CPUs.
      kept: what the rounds leave in memory.
    """
    if devices == "auto":
        devices = "mesh" if jax.device_count() > 1 and jax.devices()[0].platform != "cpu" else "first"
    return Policies(config, make_mesh(config.mesh, jax.devices()) if devices == "mesh" else None, kept)
