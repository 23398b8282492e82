"""The flags of online training, what of them cannot be used, and the folder of its rounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from kto_jax.config import Config, ConfigError, ObjectiveConfig, TransientError, resolve, to_dict
from kto_jax.config.ranges import Count, Positive, Range
from kto_jax.data.batches.schedule import check_row_length
from kto_jax.objectives import Objective, check_objective
from kto_jax.rollouts.labels import check_rule
from kto_jax.storage.atomic import write_json
from kto_jax.storage.locks import lock_file

_MAY_CHANGE = (
    *("rounds", "save_every", "keep", "batch_size", "reward_timeout"),
    *("sample_from", "sample_model", "hand_over", "max_gap"),
)
"""Flags with which a run may be resumed though it was begun with others."""


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
    resample: Annotated[int, Range(at_least=0, zero="never")] = 0
    """How often other prompts are sampled in place of those whose completions all have the same reward, in a round."""
    spread_of: str = ""
    """Name of the reward that completions of a prompt must differ in, for dapo and --resample. Empty: the sum."""
    cut: Literal["auto", "train", "drop"] = "auto"
    """What happens to completions that were cut at max_new_tokens: "train" on them as they are, without an end, or
    "drop" them. "auto": grpo and ppo train on them; other objectives drop them."""
    max_new_tokens: Count = 64
    """Longest completion, in tokens."""
    temperature: Positive = 1.0
    """Divides the logits."""
    optimizer: Literal["auto", "kept", "new"] = "auto"
    """What a round begins with: the optimizer's state (and the value head) of the round before, "kept", or a "new" one.
    "auto": kept for grpo and ppo, new for other objectives."""
    reference: Literal["initial", "previous"] = "initial"
    """The reference of a round: the model that the first round started from, or the policy before the round."""
    held_out: Annotated[int, Range(at_least=0, zero="none")] = 64
    """Held-out prompts that are completed before the first and after the last round, num_samples times each."""
    batch_size: Count = 16
    """Completions sampled at once."""
    sample_on: Literal["auto", "first", "mesh"] = "auto"
    """Where completions are sampled: on the "first" device, or over the "mesh" of training, by all processes. "auto":
    the mesh, if there are several devices other than CPUs."""
    sample_from: str = ""
    """Base of a server that samples as vLLM does, such as http://127.0.0.1:8000/v1; empty samples here."""
    sample_model: str = ""
    """What that server calls the model."""
    hand_over: str = ""
    """Program, with arguments, that makes the server sample from another policy; it gets the policy's folder besides,
    and ends when the server has taken it. Required with sample_from."""
    hand_over_every: Count = 1
    """Rounds after which the policy is handed over; rounds in between are sampled from an older one."""
    weight_cap: Positive = 2.0
    """With sample_from, grpo and ppo: largest weight of a token, by which its probability under the policy that is
    trained differs from that under the one that sampled."""
    max_gap: Positive = 0.1
    """With sample_from: mean distance of the server's and the trainer's log-probabilities, in nats per token, above
    which the run ends."""
    reward_timeout: Positive = 600.0
    """Seconds after which a reward counts as hung."""
    save_every: Count = 1
    """Rounds after which a checkpoint is written; a signal during a round's training writes one too. A run that is
    killed trains again on the completions of the rounds since the last one, with the same result. Rounds that leave
    their policy in files, as with adapters, are all saved."""
    keep: Count = 2
    """Rounds that write and keep a policy and a report, the newest ones; feedback and metrics of all are kept."""

    def keeps_optimizer(self, objective: Objective) -> bool:
        """Whether a round continues the optimizer of the round before."""
        return objective.advantages is not None if self.optimizer == "auto" else self.optimizer == "kept"

    def trains_cut(self, objective: Objective) -> bool:
        """Whether completions that were cut are trained on."""
        return objective.advantages is not None if self.cut == "auto" else self.cut == "train"


def objective_config(config: Config) -> ObjectiveConfig:
    """The objective of the rounds: one that may do so reads the log-probabilities that are sampled."""
    if config.objective.name == "grpo":
        return dataclasses.replace(config.objective, old_logps="sampled")
    return config.objective


def check_options(options: Options) -> Objective:
    """The objective of the rounds.

    Raises:
      ConfigError: flags or settings cannot be used.
    """
    config = options.config
    check_rule(options.label)
    if not options.reward:
        raise ConfigError("--reward is missing. Allowed: what docs/online.md lists. Write --reward=NAME.")
    if "://" in options.workdir:
        raise ConfigError(
            f"--workdir={options.workdir} is no local folder. Allowed: local folders; the rounds of an online run are "
            "not kept in buckets. Set --workdir."
        )
    objective = check_objective(objective_config(config))
    if (objective.scalar_head != "none" and not objective.advantages) or objective.controls:
        raise ConfigError(
            f"config.objective.name={config.objective.name!r} cannot be trained online. Allowed: objectives on thumbs, "
            "pairs or demonstrations without control texts, such as kto and dpo, and grpo and ppo. Set "
            "config.objective.name."
        )
    if config.model.init == "random":
        raise ConfigError(
            'config.model.init="random" cannot be used: random weights write nothing that a reward could tell apart. '
            'Allowed: "pretrained". Set config.model.init.'
        )
    if config.row_length not in (0, "auto"):
        check_row_length(int(config.row_length), config.data.max_length, in_pairs=objective.reads == "pairs")
    _check_adapters(options, objective)
    _check_endpoint(options)
    _check_policy_gradient(options, objective)
    if options.resample and options.num_samples == 1:
        raise ConfigError(
            f"--resample={options.resample} replaces prompts whose completions all have the same reward, and "
            "--num_samples=1 gives each prompt one. Set --num_samples to at least 2, or --resample=0."
        )
    return objective


def check_names(options: Options, rewards: Sequence[str]) -> None:
    """Refuses --spread_of if it names no reward.

    Raises:
      ConfigError: with the rewards that there are.
    """
    if options.spread_of and options.spread_of not in rewards:
        raise ConfigError(
            f"--spread_of={options.spread_of} is none of the rewards. Allowed: {', '.join(rewards)}. Set --spread_of."
        )


def _check_policy_gradient(options: Options, objective: Objective) -> None:
    config, keeps = options.config, options.keeps_optimizer(objective)
    if objective.advantages and options.temperature != 1:
        raise ConfigError(
            f"--temperature={options.temperature} cannot be used with config.objective.name={config.objective.name!r}: "
            "its ratios are of log-probabilities at temperature 1. Set --temperature=1."
        )
    if objective.advantages and objective.advantages.kl_target and options.reference == "previous":
        raise ConfigError(
            f"config.objective.kl_target={objective.advantages.kl_target} with --reference=previous cannot be used: "
            "the KL to the policy that sampled is 0. Set --reference=initial, or kl_target=0."
        )
    if objective.scalar_head == "value" and not keeps:
        raise ConfigError(
            "--optimizer=new would start every round with a new value head. Allowed with config.objective.name='ppo': "
            "auto and kept. Set --optimizer."
        )
    if keeps and config.optimizer.schedule != "constant":
        raise ConfigError(
            f"config.optimizer.schedule={config.optimizer.schedule!r} ends with the first round, and later rounds keep "
            'its optimizer. Allowed: "constant". Set config.optimizer.schedule, or --optimizer=new.'
        )


def _check_endpoint(options: Options) -> None:
    flags = ("sample_model", "hand_over", "hand_over_every", "weight_cap", "max_gap")
    usual = {field.name: field.default for field in dataclasses.fields(Options)}
    changed = [name for name in flags if getattr(options, name) != usual[name]]
    if not options.sample_from and changed:
        raise ConfigError(
            f"--{changed[0]}={getattr(options, changed[0])} without --sample_from has no effect. Set --sample_from, or "
            f"remove --{changed[0]}."
        )
    if options.sample_from and not options.sample_from.startswith(("http://", "https://")):
        raise ConfigError(
            f"--sample_from={options.sample_from} is no address. Allowed: the base of a server, such as "
            "http://127.0.0.1:8000/v1. Set --sample_from."
        )
    missing = [name for name in ("sample_model", "hand_over") if not getattr(options, name)]
    if options.sample_from and missing:
        raise ConfigError(
            f"--sample_from={options.sample_from} without --{missing[0]}. A server needs the name of its model, and a "
            f"program that makes it take the policy of a round. Set --{missing[0]}."
        )


def _check_adapters(options: Options, objective: Objective) -> None:
    """Refuses adapters beside the weights of another reference: they are trained beside the reference's own.

    Adapters that are kept with the optimizer lie beside the initial weights; new ones beside the policy before a round.
    """
    rank, keeps = options.config.lora.rank, options.keeps_optimizer(objective)
    if not rank or not objective.uses_reference or options.reference == ("initial" if keeps else "previous"):
        return
    if keeps:
        where, what = "the initial model, as adapters and optimizer are kept", "--reference=initial, or --optimizer=new"
    else:
        where = "the policy before the round, as every round has new ones"
        what = "--reference=previous, --optimizer=kept, or config.lora.rank=0"
    raise ConfigError(
        f"config.lora.rank={rank} with --reference={options.reference} cannot be used: adapters are trained beside the "
        f"weights of the reference, which are those of {where}. Set {what}."
    )


def open_folder(folder: Path, options: Options) -> Any:
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
    before = _with_new_settings(json.loads(record.read_text(encoding="utf-8")), options) if record.exists() else given
    changed = [name for name in given if name not in _MAY_CHANGE and before.get(name) != given[name]]
    if changed:
        lock.close()
        raise ConfigError(
            f"--workdir={folder} holds another run, which differs in {', '.join(changed)}. A run must be resumed with "
            "the same settings. Restore these, or choose another --workdir."
        )
    write_json(record, given)
    return lock


def _with_new_settings(recorded: dict[str, Any], options: Options) -> dict[str, Any]:
    """The record of a run, with the defaults of settings that it lacks because an earlier version began it."""
    defaults = {field.name: field.default for field in dataclasses.fields(options) if field.name != "config"}
    config = to_dict(resolve(recorded["config"]))
    return dict(json.loads(json.dumps({**defaults, **recorded, "config": config})))
