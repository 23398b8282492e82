"""What a run reads, checked and ready before any device is touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import Config, ConfigError
from kto_jax.data.batches.cutting import Controls
from kto_jax.data.batches.packing import RowLimits, choose_row_lengths
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.batches.visits import Visits
from kto_jax.data.index.index import Index, build_index
from kto_jax.data.index.manifest import weights_of
from kto_jax.data.permutation import permute
from kto_jax.data.rows.sources import sources_of
from kto_jax.data.tokens.encoder import rendering_of
from kto_jax.data.tokens.tokenizer import TokenizerInfo, encode_text, prepare_tokenizer
from kto_jax.data.truncation import fit_lengths
from kto_jax.devices import processes
from kto_jax.judges import judges
from kto_jax.models.config import TransformerConfig
from kto_jax.models.weights.load import is_reward_model, read_config
from kto_jax.objectives import Objective, check_objective, make_objective
from kto_jax.storage.fetch import local_path
from kto_jax.storage.folders import cache_directory


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A run's inputs.

    Attributes:
      model_path: where the policy's first weights are.
      reference_path: where the reference's are.
      architecture: of both.
      tokenizer: of the policy.
      index: the feedback.
      schedule: what each step reads.
      held_out: what each evaluation reads; None where nothing is held out.
      num_steps: steps of the run.
      objective: what is minimised, its weights resolved from the counts.
      controls: ids before undesirable and desirable completions; None where the objective has no control texts.
      num_desirable: completions that an epoch trains on: rows, each as often as the weight of its source says.
      num_undesirable: likewise.
    """

    model_path: Path
    reference_path: Path
    architecture: TransformerConfig
    tokenizer: TokenizerInfo
    index: Index
    schedule: Schedule
    held_out: Schedule | None
    num_steps: int
    objective: Objective
    controls: tuple[np.ndarray, np.ndarray] | None
    num_desirable: int
    num_undesirable: int


def read_inputs(config: Config, scratch: Path) -> Inputs:
    """Finds the model and tokenizes the feedback.

    Args:
      config: the run.
      scratch: folder for the tokenizer, until the run has a folder of its own.

    Raises:
      ConfigError: the configuration, the data or the model cannot be used.
    """
    objective = check_objective(config.objective)
    check_together(config, objective)
    judges.check_names(config.samples.judges)
    model_path = local_path(config.model.path)
    reference_path = local_path(config.reference.path) if config.reference.path else model_path
    architecture = read_config(model_path)
    _check_model(config, architecture, architecture if reference_path == model_path else read_config(reference_path))
    if config.objective.name != "reward" and is_reward_model(model_path):
        raise ConfigError(
            f"config.model.path={config.model.path!r} is a reward model, which has no output head. Allowed: a language "
            "model, or config.objective.name=reward. Set config.model.path."
        )
    tokenizer, controls, index = read_feedback(config, model_path, architecture.vocab_size, scratch)
    _check_judges(config, index)
    num_desirable, num_undesirable = count_visits(index)
    objective = make_objective(config.objective, num_desirable=num_desirable, num_undesirable=num_undesirable)
    schedule, held_out = make_schedules(config, index, objective, controls)
    return Inputs(
        model_path=model_path,
        reference_path=reference_path,
        architecture=architecture,
        tokenizer=tokenizer,
        index=index,
        schedule=schedule,
        held_out=held_out,
        num_steps=min(schedule.num_steps, config.max_steps) if config.max_steps else schedule.num_steps,
        objective=objective,
        controls=controls,
        num_desirable=num_desirable,
        num_undesirable=num_undesirable,
    )


def read_feedback(
    config: Config, model_path: Path, vocab_size: int, scratch: Path
) -> tuple[TokenizerInfo, tuple[np.ndarray, np.ndarray] | None, Index]:
    """Prepares the tokenizer and tokenizes the feedback, as training reads it.

    Args:
      config: the run.
      model_path: where the policy's first weights are.
      vocab_size: of the model.
      scratch: folder for the tokenizer, needed as long as the tokenizer is.

    Returns:
      The tokenizer; the ids before undesirable and desirable completions, None without control texts; the index.

    Raises:
      ConfigError: the tokenizer, its chat template or the feedback cannot be used.
    """
    data = config.data
    tokenizer = prepare_tokenizer(
        model_path,
        scratch / "tokenizer",
        chat_template=data.chat_template,
        eos_token=data.eos_token,
        rendering=rendering_of(data),
    )
    controls = _encode_controls(check_objective(config.objective), tokenizer, vocab_size)
    longest_control = max(map(len, controls)) if controls else 0
    index = build_index(
        # Prompt and completion leave room for the control between them.
        dataclasses.replace(data, max_length=data.max_length - longest_control),
        tokenizer,
        vocab_size=vocab_size,
        directory=cache_directory() / "indices",
        # Asking which process this is touches the devices, which only a run of several processes has to.
        builds=processes.is_first(),
    )
    return tokenizer, controls, index


def count_visits(index: Index) -> tuple[int, int]:
    """Desirable and undesirable completions that an epoch visits, on average over epochs."""
    visits = Visits(index.sequences("train"), index.places[:, 0], weights_of(index.manifest), seed=0)
    desirable = np.asarray(index.desirable)
    return round(visits.total(desirable)), round(visits.total(~desirable))


def make_schedules(
    config: Config, index: Index, objective: Objective, controls: Controls | None
) -> tuple[Schedule, Schedule | None]:
    """What each step reads, and each evaluation; None if nothing that counts is held out."""
    paired = objective.reads == "pairs"
    train, weights = _sequences_to_train(index, objective), weights_of(index.manifest)
    visits = Visits(train, index.places[:, 0], weights, seed=config.seed)
    limits = _row_limits(config, index, visits.at(np.arange(len(visits)), 0), paired)
    kind: dict[str, Any] = {"paired": paired, "unmatched": objective.first_pass == "unmatched"}
    order = Order(config.batch_size, config.seed, config.epochs, weights=weights)
    schedule = Schedule(index, train, order, limits, controls=controls, **kind)
    held_out = _sequences_to_evaluate(config, index, objective)
    if not len(held_out):
        return schedule, None
    once = Order(config.batch_size, config.seed, shuffle=False)
    good = controls and (controls[1], controls[1])
    return schedule, Schedule(index, held_out, once, limits, controls=good, **kind)


def _row_limits(config: Config, index: Index, visited: np.ndarray, paired: bool) -> RowLimits:
    # "auto" rows are found later (planning/rows_that_fit.py), by compiling schedules of one row and more.
    rows = 1 if config.microbatch_rows == "auto" else config.microbatch_rows
    config = dataclasses.replace(config, microbatch_rows=rows)
    lengths = choose_lengths(config, index, visited, paired)
    return RowLimits(
        lengths,
        completion_length=max(1, round(lengths[0] * config.completion_share)),
        microbatch_rows=rows,
        max_length=config.data.max_length,
    )


def choose_lengths(config: Config, index: Index, visited: np.ndarray, paired: bool) -> tuple[int, ...]:
    """Tokens of a packed row: as configured, what the longest example needs, or the few that leave the least padding.

    Args:
      config: the run.
      index: of its feedback.
      visited: sequences that an epoch visits; with `paired`, the chosen ones.
      paired: whether they are pairs.

    Returns:
      The lengths, shortest first.
    """
    unit = 2 if paired else 1
    shortest = config.data.max_length * unit
    if config.row_length != "auto":
        return (config.row_length or shortest,)
    sequences = np.stack([visited, np.asarray(index.rejected)[visited]], axis=1).reshape(-1) if paired else visited
    lengths = fit_lengths(
        index.prompt_lengths[sequences],
        index.completion_lengths[sequences],
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    return choose_row_lengths(
        *(length.reshape(-1, unit).sum(axis=1) for length in lengths),
        batch_size=config.batch_size,
        shortest=shortest,
        completion_share=config.completion_share,
        microbatch_rows=int(config.microbatch_rows),
        num_lengths=3,
        unit=unit,
    )


def _sequences_to_train(index: Index, objective: Objective) -> np.ndarray:
    """The sequences that an epoch visits: all, the desirable ones, or the chosen ones of pairs.

    Raises:
      ConfigError: there are none, or they are all of one label although both are needed.
    """
    train = index.sequences("train")
    desirable = np.asarray(index.desirable)[train]
    if objective.reads == "pairs":
        if len(pairs := index.pairs("train")):
            return pairs
        raise ConfigError(
            f"config.objective.name reads pairs, and none of {len(train)} completions to train on make one. A pair is "
            'a chosen and a rejected completion of one prompt: data.format "pairs", or a prompt with both labels '
            "(without data.one_per_prompt). Set config.data, or an objective that reads thumbs, such as kto."
        )
    if objective.reads == "desirable" and desirable.any():
        return train[desirable]
    if objective.reads == "thumbs" and (not objective.needs_both_labels or len(set(desirable.tolist())) == 2):
        return train
    only = "desirable" if desirable.any() else "undesirable"
    needed = "desirable completions" if objective.reads == "desirable" else "both labels"
    raise ConfigError(
        f"all {len(train)} completions to train on are {only}. The objective needs {needed}. Check "
        "config.data.label_field and label_map, of scores score_rule and score_threshold, or set config.objective.name "
        "to sft for demonstrations."
    )


def _sequences_to_evaluate(config: Config, index: Index, objective: Objective) -> np.ndarray:
    """The held-out sequences that an evaluation reads; none if none of them counts for what is measured."""
    held_out = index.pairs("eval") if objective.reads == "pairs" else index.sequences("eval")
    # Files are often sorted by prompt or label: the first ones would be no fair draw, and find no partners.
    held_out = held_out[permute(np.arange(len(held_out)), max(len(held_out), 1), (0,))]
    held_out = held_out[: config.evaluation.max_examples] if config.evaluation.max_examples else held_out
    measured = objective.evaluated_as or objective
    counts = measured.counts(np.ones(len(held_out), bool), np.asarray(index.desirable)[held_out])
    return held_out if np.any(counts) else held_out[:0]


def _encode_controls(
    objective: Objective, tokenizer: TokenizerInfo, vocab_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of the objective's control texts, if it has any.

    Raises:
      ConfigError: a text has no tokens, or some that the model does not have.
    """
    if not objective.controls:
        return None
    bad, good = (encode_text(tokenizer, text) for text in objective.controls)
    for text, ids in zip(objective.controls, (bad, good), strict=True):
        if not len(ids) or ids.max() >= vocab_size:
            raise ConfigError(
                f"the control {text!r} becomes the tokens {ids.tolist()}. It needs at least one, all below the model's "
                f"{vocab_size}. Set config.objective.good_control and bad_control."
            )
    return bad, good


def _check_adapters(config: Config) -> None:
    """Refuses what low-rank adapters cannot go with.

    Raises:
      ConfigError: naming the field.
    """
    conflicts = {
        "reference.path": (config.reference.path, '""', "the reference is the policy without its adapters"),
        "reference.sync_every": (config.reference.sync_every, "0", "the frozen weights cannot move"),
        "model.param_dtype": (
            config.model.param_dtype if config.model.param_dtype != "float32" else "",
            '"float32"',
            "adapters are small, and kept in float32; config.reference.param_dtype is of the frozen weights",
        ),
    }
    for field, (value, allowed, why) in conflicts.items():
        if config.lora.rank and value:
            raise ConfigError(
                f"config.{field}={value!r} cannot be used with config.lora.rank={config.lora.rank}: {why}. "
                f"Allowed: {allowed}. Set config.{field} to it, or config.lora.rank to 0."
            )


def check_together(config: Config, objective: Objective) -> None:
    """Refuses settings elsewhere that the objective has no use for.

    Raises:
      ConfigError: naming the field.
    """
    name = f"the objective {config.objective.name!r}"
    sources = sources_of(config.data)
    scored = [source.data for source in sources if source.data.format == "scores"]
    by_threshold = any(data.score_rule == "threshold" for data in scored)
    rules = [
        ("reference.path", objective.uses_reference, f"{name} holds no reference"),
        ("reference.param_dtype", objective.uses_reference or config.lora.rank > 0, f"{name} holds no reference"),
        ("reference.precompute", objective.uses_reference, f"{name} holds no reference"),
        ("reference.sync_every", objective.uses_reference, f"{name} holds no reference"),
        ("reference.sync_mix", config.reference.sync_every > 0, "reference.sync_every is 0"),
        ("lora.alpha", config.lora.rank > 0, "lora.rank is 0"),
        ("lora.targets", config.lora.rank > 0, "lora.rank is 0"),
        ("lora.zero", config.lora.rank > 0, "lora.rank is 0"),
        ("samples.num_prompts", objective.scorer != "reward", f"{name} writes no text"),
        ("optimizer.value_clip_norm", objective.scorer == "value", f"{name} has no value head"),
        ("data.score_rule", bool(scored), "no source holds scores, as data.format says"),
        ("data.score_threshold", by_threshold, "no score is held against it"),
    ]
    usual = Config()
    for field, has_use, why in rules:
        section, option = field.split(".")
        value = getattr(getattr(config, section), option)
        if value != getattr(getattr(usual, section), option) and not has_use:
            raise ConfigError(
                f"config.{field}={value!r} has no use: {why}. It must be left at its default then. Take config.{field} "
                "out, or change what it goes with."
            )
    if config.reference.param_dtype == "int8" and config.reference.sync_every:
        raise ConfigError(
            f'config.reference.param_dtype="int8" cannot be used with config.reference.sync_every='
            f"{config.reference.sync_every}: each move would round the reference again. It is for a frozen reference. "
            "Set config.reference.param_dtype to bfloat16, or take config.reference.sync_every out."
        )
    _check_adapters(config)
    moving = f"config.reference.sync_every={config.reference.sync_every} moves the reference"
    by_token = "log-probabilities are kept for whole completions, and {} needs them of each token"
    conflicts = [
        (config.reference.sync_every > 0, moving),
        (objective.humanline is not None, by_token.format("config.objective.humanline=True")),
        (objective.scorer == "value", by_token.format(name)),
    ]
    for conflict, why in conflicts:
        if config.reference.precompute and conflict:
            raise ConfigError(
                f"config.reference.precompute=True cannot be used: {why}. It is for a frozen reference of whole "
                "completions. Take config.reference.precompute out, or change what it conflicts with."
            )
    if config.batch_size < 2 and objective.first_pass == "unmatched":
        raise ConfigError(
            f"config.batch_size={config.batch_size} leaves no other example, whose completion z0 is made of. {name} "
            "needs 2 or more. Set config.batch_size."
        )
    for source in sources:
        if source.scale is not None and source.data.format != "scores":
            raise ConfigError(
                f"the source {source.path!r} of config.data has a score_rule or score_threshold of its own, and its "
                f"format is {source.data.format!r}. Only scores are judged by a rule. Take it out, or set its format."
            )
    unscored = [source for source in sources if source.data.format != "scores"]
    if config.objective.rewards == "scores" and unscored:
        raise ConfigError(
            f'config.objective.rewards="scores" needs scores, and the format of {unscored[0].path!r} is '
            f'{unscored[0].data.format!r}. Set config.data.format to "scores", or objective.rewards to "labels".'
        )


def _check_judges(config: Config, index: Index) -> None:
    """Refuses a judge that has nothing to be fitted on.

    Raises:
      ConfigError: naming the share to raise.
    """
    counts = index.manifest["splits"]["judge"]
    wanted = config.samples.num_prompts and "feedback" in config.samples.judges
    if wanted and not (counts["desirable"] and counts["undesirable"]):
        raise ConfigError(
            f'config.samples.judges has "feedback", for which config.data.judge_holdout={config.data.judge_holdout} '
            f"leaves {counts['desirable']} desirable and {counts['undesirable']} undesirable completions. It needs "
            "both. Raise config.data.judge_holdout, or take the judge out."
        )


def _check_model(config: Config, policy: TransformerConfig, reference: TransformerConfig) -> None:
    """Refuses lengths beyond the models' context, and a reference of another architecture.

    Raises:
      ConfigError: naming both sides.
    """
    context = min(policy.max_length, reference.max_length)
    if config.data.max_length > context:
        raise ConfigError(
            f"config.data.max_length={config.data.max_length} is beyond the model's context of {context} "
            f"tokens. Allowed: up to {context}. Set config.data.max_length."
        )
    # These fields say nothing of the weights or of the logits.
    unrelated = ("family", "bos_id", "eos_ids", "max_length", "initializer_range")
    differing = [
        f"{field.name} {getattr(reference, field.name)!r} against {getattr(policy, field.name)!r}"
        for field in dataclasses.fields(policy)
        if field.name not in unrelated and getattr(reference, field.name) != getattr(policy, field.name)
    ]
    if differing:
        raise ConfigError(
            f"config.reference.path={config.reference.path!r} is of another architecture than the policy: "
            f"{', '.join(differing)}. Both must be equal. Set config.reference.path."
        )
