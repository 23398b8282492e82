"""The training of the rounds: the folder and the configuration of each, where it starts, and what it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kto_jax.config import Config, ConfigError
from kto_jax.devices import processes
from kto_jax.exports.checkpoint import export_checkpoint
from kto_jax.objectives import Objective
from kto_jax.rollouts.options import Options, objective_config
from kto_jax.rollouts.rounds import Row
from kto_jax.storage.atomic import write_text
from kto_jax.training.checkpoint_reading import VERIFIED
from kto_jax.training.kept import Kept, Start
from kto_jax.training.logs import read_metrics

_LAST = ("loss", "z0", "kl", "margin", "reference_kl")
_MEANS = ("clipped", "old_kl", "value_loss", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Runs:
    """The training of the rounds.

    Attributes:
      options: the flags.
      objective: of the rounds.
      folder: of the whole run.
      kept: what a round leaves in memory for the next one.
    """

    options: Options
    objective: Objective
    folder: Path
    kept: Kept = dataclasses.field(default_factory=Kept)

    def folder_of(self, number: int) -> Path:
        """The folder of a round."""
        return self.folder / f"round_{number:03}"

    def run_of(self, number: int) -> Path:
        """The folder of a round's training."""
        return self.folder_of(number) / "run"

    @property
    def initial(self) -> str:
        """The model that the first round starts from."""
        return self.options.config.model.path

    def policy_before(self, number: int) -> str:
        """Where the policy before a round is, if it was exported."""
        return str(self.run_of(number - 1) / "policy") if number else self.initial

    @property
    def keeps_optimizer(self) -> bool:
        """Whether a round continues the optimizer of the round before."""
        return self.options.keeps_optimizer(self.objective)

    @property
    def format(self) -> Literal["thumbs", "pairs", "scores"]:
        """What the feedback is, as `data.format` calls it."""
        if self.objective.advantages:
            return "scores"
        return "pairs" if self.objective.reads == "pairs" else "thumbs"

    @property
    def passes_files(self) -> bool:
        """Whether every round reads the exported policy of the round before: adapters are merged in it, and a reference
        that is rounded, or asked before the first step, is made of it."""
        config, options = self.options.config, self.options
        follows = self.objective.uses_reference and options.reference == "previous"
        return config.lora.rank > 0 or (
            follows and (config.reference.param_dtype != "auto" or config.reference.precompute)
        )

    def is_exported(self, number: int) -> bool:
        """Whether policy/ and a report are written: by the newest rounds, which are kept, and for a server."""
        options, ended = self.options, number + 1
        is_handed = options.sample_from and ended % options.hand_over_every == 0
        return bool(self.passes_files or is_handed or ended > options.rounds - options.keep)

    def is_saved(self, number: int) -> bool:
        """Whether a round leaves a checkpoint, or a policy/ that the next one reads."""
        ended = number + 1
        return self.passes_files or ended % self.options.save_every == 0 or ended >= self.options.rounds

    def exported_before(self, number: int) -> Path:
        """The folder of the policy before a round, which one process alone can write if the round before did not.

        Raises:
          ConfigError: several processes would have to.
        """
        run = self.run_of(number - 1)
        if not (run / "policy").is_dir():
            if processes.num_processes() > 1:
                raise ConfigError(
                    f"{run} has no policy/, as it ended before --sample_from was set. A server takes the policy from a "
                    f"folder. Write it with python -m kto_jax.export --run={run} --to={run}/policy --merge, and run "
                    "the same command again."
                )
            export_checkpoint(run, run / "policy", merge=True)
        return run / "policy"

    def start_of(self, number: int) -> Start:
        """Where the training of a round starts, and what it leaves."""
        goes_on = number > 0 and (self.keeps_optimizer or not self.passes_files)
        after = self.run_of(number - 1) if goes_on else None
        return Start(self.kept, after, self.keeps_optimizer, self.is_exported(number), self.is_saved(number))

    def config_of(self, number: int) -> Config:
        """The configuration of a round's training."""
        config, feedback = self.options.config, self.folder_of(number) / "feedback.jsonl"
        model, reference = config.model, config.reference
        # Adapters that are kept lie beside the initial weights in every round.
        merges = self.passes_files and not (config.lora.rank and self.keeps_optimizer)
        if number and (merges or self._was_begun_with_files(number)):
            model = dataclasses.replace(model, path=self.policy_before(number), base="", init="pretrained")
        if self.objective.uses_reference and number and not config.lora.rank:
            if self.options.reference == "initial":
                reference = dataclasses.replace(reference, path=self.initial, base=config.model.base)
            elif reference.param_dtype == "auto":
                reference = dataclasses.replace(reference, param_dtype=config.model.param_dtype)
        data = dataclasses.replace(
            config.data, train=str(feedback), eval="", layout="halos", rename={}, prompt_template="",
            format=self.format, prompt_field="prompt", system_field="",
            label_map={}, holdout=0.0, judge_holdout=0.0, max_rejected=1.0,
            sampled_tokens=True, max_prompt_length=config.data.max_length - 1,
        )  # fmt: skip
        # Rounding every round's policy to fewer bits than it was trained in would lose small updates.
        dtype = "float32" if config.model.param_dtype == "float32" else config.model.param_dtype
        export = dataclasses.replace(config.export, dtype=dtype)
        samples = dataclasses.replace(config.samples, num_prompts=0, judges=())
        return dataclasses.replace(
            config, model=model, reference=reference, data=data, export=export, samples=samples,
            objective=objective_config(config),
            seed=(config.seed + number) % 2**32,
        )  # fmt: skip

    def _was_begun_with_files(self, number: int) -> bool:
        """Whether an earlier version began the round: its configuration names the policy of the round before."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            recorded = json.loads((self.run_of(number) / "config.json").read_text(encoding="utf-8"))
            return bool(recorded["model"]["path"] == self.policy_before(number))
        return False

    # -------------------------------------------------------------------------------------------- what a round leaves
    def log(self) -> list[Row]:
        """The figures of the finished rounds."""
        path = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def forget_unsaved(self) -> range:
        """Forgets the training of the rounds that nothing can continue; returns those that are trained again."""
        log = self.log()
        saved = _num_saved(log)
        if saved == len(log) or saved >= self.options.rounds or self._has_checkpoint(len(log)):
            return range(0)
        self._write_log(log[:saved])
        for number in range(saved, len(log)):
            _remove(self.run_of(number))
        return range(saved, min(len(log), self.options.rounds))

    def record(self, number: int, figures: Mapping[str, float], dropped: Mapping[str, int]) -> dict[str, float]:
        """Appends a finished round to rounds.jsonl, and removes what later rounds do not need; returns its figures."""
        figures, dropped = dict(figures) | self._training_figures(number), dict(dropped) | self._rejected(number)
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        log = [*self.log(), {"round": number, **finite, "dropped": dropped, "saved": self.is_saved(number)}]
        self._write_log(log)
        # A round starts with the checkpoint or the policy of the one before, and a resumed run with the last saved one.
        last = _num_saved(log) - 1
        for before in range(number):
            if before != last:
                _remove(self.run_of(before) / "checkpoints")
            if before != last and before <= number - self.options.keep:
                _remove(self.run_of(before) / "policy")
        return figures

    def _write_log(self, rows: Sequence[Row]) -> None:
        write_text(self.folder / "rounds.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self) -> None:
        """Removes the last checkpoint, unless more rounds would continue its optimizer."""
        if not self.keeps_optimizer and (self.run_of(self.options.rounds - 1) / "policy").is_dir():
            _remove(self.run_of(self.options.rounds - 1) / "checkpoints")

    def _has_checkpoint(self, number: int) -> bool:
        """Whether a round can continue with a checkpoint of its own, as after a signal."""
        if processes.num_processes() > 1:
            return False  # They gather the policy before a round, of which nothing may be left.
        verified = self.run_of(number).glob(f"checkpoints/*/{VERIFIED}")
        return any(path.parent.name.isdecimal() for path in verified)

    def _training_figures(self, number: int) -> dict[str, float]:
        """Figures of the round's last step, and means over its steps."""
        rows = read_metrics(self.run_of(number) / "metrics.jsonl")
        known = {name: [row[name] for row in rows if row.get(name) is not None] for name in (*_LAST, *_MEANS)}
        last = {name: known[name][-1] for name in _LAST if known[name]}
        return last | {name: float(np.mean(known[name])) for name in _MEANS if known[name]}

    def _rejected(self, number: int) -> dict[str, Any]:
        """Rows of the feedback that training did not read, by reason."""
        manifest = json.loads((self.run_of(number) / "manifest.json").read_text(encoding="utf-8"))
        return {f"rejected: {reason}": count for reason, count in manifest["rejections"]["histogram"].items()}


def _num_saved(log: Sequence[Row]) -> int:
    """Rounds up to the last one that was saved; versions that did not say so saved every round."""
    return max((number for number, row in enumerate(log, 1) if row.get("saved", True)), default=0)


def _remove(folder: Path) -> None:
    """Removes a folder of a round at once: a run that is killed meanwhile does not find a part of it."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.is_dir():
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
