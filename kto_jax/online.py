"""Trains online: samples completions, scores them with rewards, trains on the feedback that they make, and repeats.

python -m kto_jax.online --config=configs/online_quickstart.py --reward="max_words(12)" --reward="ends_with('.')"

`config.data.train` names a file of prompts; a share `config.data.holdout` of them is never trained on, and measured
before the first and after the last round. Every round is an ordinary run, RUN/round_000/run, on the feedback in
RUN/round_000/feedback.jsonl; its policy is where the next round starts. The same command resumes. docs/online.md
explains the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from kto_jax.command import FINISHED, run_command
from kto_jax.config import Config, ConfigError, TransientError, to_dict
from kto_jax.config.ranges import Count, Positive, Range
from kto_jax.devices import processes
from kto_jax.devices.compilation import keep_compiled
from kto_jax.objectives import Objective, check_objective
from kto_jax.rewards.functions import open_rewards
from kto_jax.rollouts.labels import Labelled, advantages, check_rule, label
from kto_jax.rollouts.prompts import PromptRow, prompts_of_round, read_prompts
from kto_jax.rollouts.rounds import Rollout, Row, check_feedback, figures_of, sample_round, warnings_of
from kto_jax.sampling.complete import LanguageModel, open_language_model
from kto_jax.sampling.sample import Sampling
from kto_jax.storage.atomic import write_json, write_text
from kto_jax.storage.locks import lock_file
from kto_jax.train import train
from kto_jax.training.logs import console, read_metrics
from kto_jax.training.preemption import Preemption


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    config: Config
    """Recipe of a round's training by its name, or the path of a config file; its data.train holds prompts."""
    reward: tuple[str, ...] = ()
    """A reward, as docs/online.md lists them; may be given several times, each with "* WEIGHT" behind it. Required."""
    workdir: str = ""
    """Folder of all rounds; the same command resumes. Empty is runs/NAME for the recipe NAME."""
    rounds: Count = 4
    """How many rounds; a finished run can be given more."""
    prompts_per_round: Count = 64
    """Prompts that a round completes."""
    num_samples: Count = 4
    """Completions of each prompt."""
    label: str = "mean"
    """What a reward must exceed to be desirable: "mean" or "median" of the round, "prompt_mean", or a number, which it
    may also equal. Objectives on pairs take each prompt's best and worst completion instead."""
    keep_cut: bool = False
    """Train also on completions that were cut at max_new_tokens, as if they ended there."""
    max_new_tokens: Count = 64
    """Longest completion, in tokens."""
    temperature: Positive = 1.0
    """Divides the logits."""
    reference: Literal["initial", "previous"] = "initial"
    """The reference of a round: the model that the first round started from, or the policy before the round."""
    held_out: Annotated[int, Range(at_least=0, zero="none")] = 64
    """Held-out prompts that are completed before the first and after the last round, num_samples times each."""
    batch_size: Count = 16
    """Completions sampled at once."""
    reward_timeout: Positive = 600.0
    """Seconds after which a reward counts as hung."""
    keep: Count = 2
    """Rounds whose policies are kept, the newest ones; feedback, metrics and reports of all are."""


_HELD_OUT = 2**31
"""Number of the round whose random keys the held-out completions take."""
_MAY_CHANGE = ("rounds", "keep", "batch_size", "reward_timeout")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "kto_jax.online", *arguments])

    def run_once(options: Options) -> int:
        with Preemption() as preemption:
            return train_online(options, command, preemption)

    return run_command(run_once, Options, str(__doc__), arguments)


def train_online(options: Options, command: str, preemption: Preemption) -> int:
    """Runs the rounds that are still to be run; returns the exit code.

    Raises:
      ConfigError: a flag, the configuration, the prompts or a reward cannot be used.
      TransientError: running the same command again may help.
    """
    objective = _check(options)
    prompts, held_out = read_prompts(options.config.data)
    folder = Path(options.workdir)
    keep_compiled()
    with open_rewards(options.reward) as rewards, _open_folder(folder, options):
        sampling = Sampling(options.temperature, 1.0, 0, options.max_new_tokens)
        rollout = Rollout(sampling, options.num_samples, options.batch_size, rewards, options.reward_timeout)
        online = _Online(options, objective, folder, prompts, held_out[: options.held_out], rollout, command)
        console.print(
            f"{len(prompts)} prompts to train on, {len(online.held_out)} of {len(held_out)} held-out ones measured"
        )
        for number in range(options.rounds):
            exit_code = online.run_round(number, preemption)
            if exit_code != FINISHED:
                return exit_code
        online.finish()
    return FINISHED


def _check(options: Options) -> Objective:
    config = options.config
    check_rule(options.label)
    if not options.reward:
        raise ConfigError("--reward is missing. Allowed: what docs/online.md lists. Write --reward=NAME.")
    if "://" in options.workdir:
        raise ConfigError(
            f"--workdir={options.workdir} is no local folder. Allowed: local folders; the rounds of an online run are "
            "not kept in buckets. Set --workdir."
        )
    objective = check_objective(config.objective)
    if objective.scalar_head != "none" or objective.controls:
        raise ConfigError(
            f"config.objective.name={config.objective.name!r} cannot be trained online. Allowed: objectives on thumbs, "
            "pairs or demonstrations without a value head or control texts, such as kto and dpo. Set "
            "config.objective.name."
        )
    if config.model.init == "random":
        raise ConfigError(
            'config.model.init="random" cannot be used: random weights write nothing that a reward could tell apart. '
            'Allowed: "pretrained". Set config.model.init.'
        )
    if config.lora.rank and options.reference == "initial":
        raise ConfigError(
            f"config.lora.rank={config.lora.rank} with --reference=initial cannot be used: adapters are trained beside "
            "the weights of the reference, which are those of the policy before the round. Set --reference=previous, "
            "or config.lora.rank=0."
        )
    if objective.advantages and options.reference == "initial":
        raise ConfigError(
            f"config.objective.name={config.objective.name!r} with --reference=initial cannot be used: its reference "
            "is the policy that sampled the completions. Set --reference=previous."
        )
    if config.processes.count > 1:
        raise ConfigError(
            f"config.processes.count={config.processes.count}: online training runs in one process, on all of its "
            "devices. Set config.processes.count=1."
        )
    processes.join(config.processes)
    return objective


def _open_folder(folder: Path, options: Options) -> Any:
    """Locks the folder and records the flags; or compares them with those of the run that is resumed.

    Raises:
      ConfigError: they differ.
      TransientError: another process uses the folder.
    """
    flags = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "config"}
    given = json.loads(json.dumps({**flags, "config": to_dict(options.config)}))
    del given["workdir"]
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("a+")
    try:
        lock_file(lock, wait=False, without=f"Make sure that no other run writes to --workdir={folder}.")
    except BlockingIOError:
        lock.close()
        raise TransientError(
            f"--workdir={folder} is in use by another process. One run may write to a folder. Wait for it to end, or "
            "choose another --workdir."
        ) from None
    record = folder / "online.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else given
    changed = [name for name in given if name not in _MAY_CHANGE and before.get(name) != given[name]]
    if changed:
        lock.close()
        raise ConfigError(
            f"--workdir={folder} holds another run, which differs in {', '.join(changed)}. A run must be resumed with "
            "the same settings. Restore these, or choose another --workdir."
        )
    write_json(record, given)
    return lock


@dataclasses.dataclass(frozen=True)
class _Online:
    """An online run."""

    options: Options
    objective: Objective
    folder: Path
    prompts: Sequence[PromptRow]
    held_out: Sequence[PromptRow]
    rollout: Rollout
    command: str

    def run_round(self, number: int, preemption: Preemption) -> int:
        """Runs one round, or what is left of it; returns the exit code of its training."""
        options, round_folder = self.options, self.folder / f"round_{number:03}"
        if number < len(self._log()):
            return FINISHED
        started = time.monotonic()
        console.print(f"round {number + 1} of {options.rounds}")
        feedback = round_folder / "feedback.jsonl"
        chosen = prompts_of_round(self.prompts, number, options.prompts_per_round, options.config.seed)
        rows = self._sample(number, chosen)
        labelled = self._label(rows)
        dropped = ", ".join(f"{count} {reason}" for reason, count in labelled.dropped.items())
        figures = figures_of(rows)
        for warning in warnings_of(figures, options.max_new_tokens):
            console.print(f"warning: {warning}", style="yellow")
        both = self.objective.reads == "thumbs" and self.objective.needs_both_labels
        check_feedback(labelled.rows, needs_both=both, number=number, dropped=dropped)
        write_text(feedback, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled.rows))
        kind = {
            "pairs": "pairs",
            "thumbs": f"thumbs, {labelled.desirable} of them desirable",
            "scores": f"advantages, {labelled.desirable} of them positive",
        }[self._format()]
        console.print(
            f"reward {figures['reward']:.3f} over {len(rows)} completions; {len(labelled.rows)} {kind}"
            + (f"; not used: {dropped}" if dropped else "")
        )
        sampled = time.monotonic()
        exit_code = train(self._config_of(number, feedback), round_folder / "run", self.command, preemption)
        if exit_code == FINISHED:
            seconds = {"sampling_seconds": sampled - started, "training_seconds": time.monotonic() - sampled}
            self._record(number, figures | seconds | self._training_figures(number), labelled.dropped)
        return exit_code

    def _format(self) -> Literal["thumbs", "pairs", "scores"]:
        """What the feedback is, as `data.format` calls it."""
        if self.objective.advantages:
            return "scores"
        return "pairs" if self.objective.reads == "pairs" else "thumbs"

    def _label(self, rows: Sequence[Row]) -> Labelled:
        objective, keep_cut = self.objective, self.options.keep_cut
        if objective.advantages:
            drop_equal = objective.options.get("variant") == "dapo"
            return advantages(rows, kind=objective.advantages, drop_equal=drop_equal, keep_cut=keep_cut)
        rule = check_rule(self.options.label)
        return label(rows, pairs=objective.reads == "pairs", rule=rule, keep_cut=keep_cut)

    def _sample(self, number: int, chosen: Sequence[PromptRow]) -> list[Row]:
        """The round's completions; before the first round, also those of the held-out prompts."""
        seed, path = self.options.config.seed, self.folder / f"round_{number:03}" / "rollout.jsonl"
        with self._open_policy(number) as model:
            if number == 0:
                self._measure(model, 0)
            return sample_round(model, chosen, self.rollout, number=number, seed=seed, path=path)

    def _open_policy(self, rounds: int) -> contextlib.AbstractContextManager[LanguageModel]:
        """The policy after a number of rounds."""
        config = self.options.config
        path = self._policy_before(rounds)
        return open_language_model(path, dtype=config.model.dtype, chat_template=config.data.chat_template)

    def _measure(self, model: LanguageModel, rounds: int) -> dict[str, float]:
        """Figures of the held-out prompts, completed by the policy after a number of rounds."""
        if not self.held_out:
            return {}
        path, seed = self._held_out_path(rounds), self.options.config.seed
        return figures_of(sample_round(model, self.held_out, self.rollout, number=_HELD_OUT, seed=seed, path=path))

    def _held_out_path(self, rounds: int) -> Path:
        return self.folder / f"held_out_after_{rounds:03}_rounds.jsonl"

    def _policy_before(self, number: int) -> str:
        return str(self.folder / f"round_{number - 1:03}" / "run" / "policy") if number else self._initial()

    def _initial(self) -> str:
        return self.options.config.model.path

    def _config_of(self, number: int, feedback: Path) -> Config:
        config = self.options.config
        model = dataclasses.replace(config.model, path=self._policy_before(number))
        if number:
            model = dataclasses.replace(model, base="", init="pretrained")
        reference = config.reference
        if self.objective.uses_reference and self.options.reference == "initial" and number:
            reference = dataclasses.replace(reference, path=self._initial(), base=config.model.base)
        data = dataclasses.replace(
            config.data, train=str(feedback), eval="", layout="halos", rename={}, prompt_template="",
            format=self._format(), prompt_field="prompt", system_field="",
            label_map={}, holdout=0.0, judge_holdout=0.0, max_rejected=1.0,
        )  # fmt: skip
        # Rounding every round's policy to fewer bits than it was trained in would lose small updates.
        dtype = "float32" if config.model.param_dtype == "float32" else config.model.param_dtype
        export = dataclasses.replace(config.export, dtype=dtype)
        samples = dataclasses.replace(config.samples, num_prompts=0, judges=())
        return dataclasses.replace(
            config, model=model, reference=reference, data=data, export=export, samples=samples,
            seed=(config.seed + number) % 2**32,
        )  # fmt: skip

    def _training_figures(self, number: int) -> dict[str, float]:
        rows = read_metrics(self.folder / f"round_{number:03}" / "run" / "metrics.jsonl")
        return {name: rows[-1][name] for name in ("loss", "z0", "kl", "margin") if rows and name in rows[-1]}

    def _log(self) -> list[Row]:
        path = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def _record(self, number: int, figures: dict[str, float], dropped: dict[str, int]) -> None:
        """Appends a finished round to rounds.jsonl, and removes what later rounds do not need."""
        row = {"round": number, **{k: v for k, v in figures.items() if math.isfinite(v)}, "dropped": dropped}
        write_text(self.folder / "rounds.jsonl", "".join(json.dumps(one) + "\n" for one in [*self._log(), row]))
        shutil.rmtree(self.folder / f"round_{number:03}" / "run" / "checkpoints", ignore_errors=True)
        old = number - self.options.keep
        if old >= 0:
            shutil.rmtree(self.folder / f"round_{old:03}" / "run" / "policy", ignore_errors=True)

    def finish(self) -> None:
        """Measures the held-out prompts with the last policy and prints what changed."""
        rounds = self.options.rounds
        if self.held_out:
            with self._open_policy(rounds) as model:
                before, after = self._measure(model, 0), self._measure(model, rounds)
            write_json(self.folder / "held_out.json", {"before": before, "after": after})
            for name in ("reward", *(name for name in before if name.startswith("reward/")), "num_tokens", "cut"):
                console.print(f"held-out {name}: {before[name]:.3f} before, {after[name]:.3f} after {rounds} rounds")
            error = math.hypot(before["reward_error"], after["reward_error"])
            console.print(
                f"held-out reward changed by {after['reward'] - before['reward']:+.3f} ± {1.96 * error:.3f} "
                f"(95 %, over {len(self.held_out)} prompts)"
            )
        console.print(f"next: python -m kto_jax.generate --model={self._policy_before(rounds)} --prompt=...")


if __name__ == "__main__":
    sys.exit(main())
