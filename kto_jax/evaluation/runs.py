"""A run's checkpoints, with the feedback that they were not trained on.

from kto_jax.evaluation.runs import open_run

with open_run("runs/mine") as run:
    print(run.held_out(run.steps[-1]).loss)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kto_jax.config import Config, ConfigError, MeshConfig, ProcessesConfig, resolve
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.data.workers import Workers
from kto_jax.devices.inference import Devices, Placed, place_model
from kto_jax.devices.sharding import place_batch
from kto_jax.evaluation.calibration import Ranking, auc_interval, rank_pairs, rank_thumbs
from kto_jax.evaluation.intervals import Interval
from kto_jax.judges import judges
from kto_jax.models.model import Model, Params
from kto_jax.objectives import Objective
from kto_jax.sampling.complete import LanguageModel
from kto_jax.storage.folders import scratch_folder
from kto_jax.storage.run_place import fetched
from kto_jax.training.initial_state import load_reference, make_model, reference_shardings
from kto_jax.training.inputs import Inputs, read_inputs
from kto_jax.training.resume import with_recorded_settings
from kto_jax.training.state import TrainState
from kto_jax.training.step import jit_evaluation_step
from kto_jax.training.stored_policy import StoredPolicy, find_step, find_steps, load_checkpoint, read_model


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Figures of a checkpoint on held-out feedback.

    Attributes:
      step: steps that were taken.
      loss: mean loss per example; every batch has its own z0, as in training.
      examples: thumbs, pairs or demonstrations.
      prompts: how many different prompts they have.
      margin: mean reward of desirable completions less that of undesirable ones; NaN without both.
      auc: see `Ranking`.
      ranking: accuracy, AUC and calibration; None if the objective's rewards predict no thumbs.
    """

    step: int
    loss: float
    examples: int
    prompts: int
    margin: float
    auc: Interval
    ranking: Ranking | None


@dataclasses.dataclass(frozen=True, eq=False)
class OpenRun:
    """A run, from `open_run`.

    Attributes:
      path: its folder.
      config: its configuration, for one device.
      inputs: its feedback and tokenizer.
      steps: of its checkpoints.
      workers: the process that encodes prompts.
      devices: those that complete prompts; figures on feedback are measured on one.
    """

    path: Path
    config: Config
    inputs: Inputs
    steps: list[int]
    workers: Workers
    devices: Devices

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.resolve().name

    def find_step(self, step: str) -> int:
        """The step of a checkpoint: "last", "best" or a number.

        Raises:
          ConfigError: there is none; lists those that there are.
        """
        return find_step(self.path, step)

    @functools.cached_property
    def reference(self) -> Params:
        """The model that the run started from, or its reference model, as the run kept it."""
        config = self.config
        if config.reference.param_dtype == "auto":  # of a run that held none
            config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, param_dtype="float32"))
        mesh, model = make_model(config, self.inputs, devices=jax.devices()[:1])
        plain = dataclasses.replace(model, scalar_head="none")
        return load_reference(config, self.inputs, plain, reference_shardings(config, plain, mesh))

    @functools.lru_cache(maxsize=1)  # noqa: B019 (the run is closed with the command)
    def _checkpoint(self, step: int) -> StoredPolicy:
        return load_checkpoint(self.path, str(step), dtype=self.config.model.dtype)[1]

    def language_model(self, step: int | None) -> LanguageModel:
        """The policy of a checkpoint as a model that completes prompts; the reference for None.

        Raises:
          ConfigError: the run trains a reward model, which writes nothing.
        """
        if self.inputs.objective.scalar_head == "reward":
            raise ConfigError(
                f"{self.path} trains a reward model, which writes no completions. Allowed: runs of a language model. "
                "Take --judge and --prompts out to see its held-out figures alone."
            )

        def load() -> Params:
            return self.placed.place(dict(self.reference if step is None else self._checkpoint(step).policy))

        return LanguageModel(self.placed.model, self.inputs.tokenizer, load, self.workers, self.placed)

    @functools.cached_property
    def placed(self) -> Placed:
        """The devices that complete prompts."""
        dtype = self.config.model.dtype
        return place_model(read_model(self.path).config, dtype=dtype, devices=self.devices)

    def held_out_prompts(self, count: int) -> list[np.ndarray]:
        """The token ids of the first distinct held-out prompts, in source order."""
        index = self.inputs.index
        rows = index.sequences("eval")
        _, first = np.unique(np.asarray(index.prompt_hashes)[rows], return_index=True)
        return [np.asarray(index.prompt(row)) for row in rows[np.sort(first)[:count]]]

    def feedback_judge(self) -> judges.FeedbackJudge:
        """A judge fitted on the run's share of feedback for judges, which no policy was trained on.

        Raises:
          ConfigError: the share is empty or has one label only.
        """
        index, tokenizer = self.inputs.index, self.inputs.tokenizer
        rows = index.sequences("judge")
        texts = [tokenize.decode(tokenizer, index.completion(row)) for row in rows]
        labels = np.asarray(index.desirable)[rows]
        return judges.fit_feedback_judge(texts, labels.tolist(), np.asarray(index.prompt_hashes)[rows].tolist())

    def held_out(self, step: int) -> HeldOut | None:
        """Figures on the held-out feedback of the run; None if it has none."""
        schedule, objective = self.inputs.held_out, self.inputs.objective
        if schedule is None:
            return None
        objective = objective.evaluated_as or objective
        mesh, _ = self._evaluation_model
        stored = self._checkpoint(step)
        state = TrainState(
            step=jnp.asarray(step), policy=stored.policy,
            reference=self.reference if objective.uses_reference else {}, opt_state=(),
            objective_state={name: jnp.asarray(value) for name, value in stored.objective_state.items()},
            num_bad_steps=jnp.zeros((), jnp.int32),
        )  # fmt: skip
        evaluate, rewards, gains, ids, loss = self._evaluate, [], [], [], 0.0
        for number in range(schedule.num_steps):
            batch = place_batch(mesh, schedule.batch(number))
            figures, batch_rewards, batch_gains = jax.device_get(evaluate(state, batch))
            loss += float(figures["loss_sum"])
            rewards.append(schedule.by_sequence(number, batch_rewards, batch_rewards)[0])
            gains.append(schedule.by_sequence(number, batch_gains, batch_gains)[0])
            ids.append(schedule.step(number).ids)
        return _figures(step, loss, objective, self.inputs, *(np.concatenate(part) for part in (rewards, gains, ids)))

    @functools.cached_property
    def _evaluation_model(self) -> tuple[Mesh, Model]:
        # Checkpoints of adapters are read with these merged.
        whole = dataclasses.replace(self.config, lora=dataclasses.replace(self.config.lora, rank=0))
        return make_model(whole, self.inputs, devices=jax.devices()[:1])

    @functools.cached_property
    def _evaluate(self) -> Any:
        objective = self.inputs.objective.evaluated_as or self.inputs.objective
        return jit_evaluation_step(self._evaluation_model[1], objective)


def _figures(
    step: int,
    loss: float,
    objective: Objective,
    inputs: Inputs,
    rewards: np.ndarray,
    gains: np.ndarray,
    ids: np.ndarray,
) -> HeldOut:
    """The figures, from the rewards and gains of sequences; those of pairs are chosen, rejected, chosen, …"""
    desirable = np.asarray(inputs.index.desirable)[ids]
    prompts = np.asarray(inputs.index.prompt_hashes)[ids].tolist()
    rewards, gains = rewards.astype(float), gains.astype(float)
    counted = int(np.sum(objective.counts(np.ones(len(ids), bool), desirable)))
    ranking = None
    if objective.reads == "pairs":
        counted = len(ids) // 2
        ranking = rank_pairs(rewards[0::2], rewards[1::2], prompts[0::2])
        desirable = np.arange(len(ids)) % 2 == 0
    elif objective.reads == "thumbs" and objective.uses_reference:
        ranking = rank_thumbs(rewards, gains, desirable, prompts)
    both = desirable.any() and not desirable.all()
    return HeldOut(
        step=step,
        loss=loss / max(counted, 1),
        examples=counted,
        prompts=len(set(prompts)),
        margin=float(rewards[desirable].mean() - rewards[~desirable].mean()) if both else float("nan"),
        auc=ranking.auc if ranking else auc_interval(rewards, desirable, prompts),
        ranking=ranking,
    )


@contextlib.contextmanager
def open_run(path: str, *, devices: Devices = "one") -> Iterator[OpenRun]:
    """Opens a run that was trained on any machine.

    Args:
      path: its folder, also in a bucket.
      devices: those of this process that complete prompts, as `place_model` takes them.

    Yields:
      The run. Its feedback is read as in training, or reopened from the cache.

    Raises:
      ConfigError: it is no run, it has no checkpoint, or its feedback or model cannot be read or has changed.
    """
    folder = Path(fetched(path, checkpoints=True))
    steps = find_steps(folder)
    config = _for_one_device(folder)
    with scratch_folder() as scratch, tokenize.tokenizing_worker() as workers:
        inputs = read_inputs(config, scratch)
        recorded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if inputs.index.manifest["content_sha256"] != recorded["content_sha256"]:
            raise ConfigError(
                f"the feedback that {folder} names has changed since it was trained, so rows may be held out that it "
                "was trained on. The files must be as they were. Restore them, or evaluate its policy/ with --model."
            )
        yield OpenRun(folder, config, inputs, steps, workers, devices)


def _for_one_device(folder: Path) -> Config:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = with_recorded_settings(resolve(values), folder)
    reference = dataclasses.replace(config.reference, precompute=False)
    rows = 1 if config.microbatch_rows == "auto" else config.microbatch_rows
    return dataclasses.replace(
        config, mesh=MeshConfig(), processes=ProcessesConfig(), microbatch_rows=rows, reference=reference,
        model=dataclasses.replace(config.model, attention="auto", remat="none"),
        data=dataclasses.replace(config.data, num_loaders=0),
    )  # fmt: skip
