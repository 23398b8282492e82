"""A run's inputs, checked and ready before any device is used."""

from __future__ import annotations

import dataclasses
import shutil
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
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.prompts import rendering_of
from kto_jax.data.tokens.tokenizer import TokenizerInfo, encode_text
from kto_jax.data.truncation import fit_lengths
from kto_jax.devices import processes
from kto_jax.judges import judges
from kto_jax.models.config import TransformerConfig
from kto_jax.models.weights.load import is_reward_model, read_config
from kto_jax.models.weights.model_files import ModelFiles, find_model
from kto_jax.objectives import Objective, check_objective, make_objective
from kto_jax.storage.folders import cache_directory
from kto_jax.training import checks

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A run's inputs.

    Attributes:
      policy_files: files of the policy's initial weights.
      reference_files: files of the reference's weights.
      architecture: of both.
      tokenizer: of the policy.
      index: the feedback.
      schedule: the training batches.
      held_out: the evaluation batches; None if nothing is held out.
      num_steps: number of steps of the run.
      objective: the objective, with weights resolved from the counts.
      controls: ids before undesirable and desirable completions; None if the objective has no control texts.
      num_desirable: completions that an epoch trains on, each counted as often as its source's weight says.
      num_undesirable: likewise.
    """

    policy_files: ModelFiles
    reference_files: ModelFiles
    architecture: TransformerConfig
    tokenizer: TokenizerInfo
    index: Index
    schedule: Schedule
    held_out: Schedule | None
    num_steps: int
    objective: Objective
    controls: Controls | None
    num_desirable: int
    num_undesirable: int


def read_inputs(config: Config, scratch: Path) -> Inputs:
    """Locates the model and tokenizes the feedback.

    Args:
      config: the run.
      scratch: folder for the tokenizer, until the run has its own folder.

    Raises:
      ConfigError: the configuration, the data or the model cannot be used.
    """
    objective = check_objective(config.objective)
    checks.check_conflicts(config, objective)
    judges.check_names(config.samples.judges)
    policy_files = find_model(config.model.path, config.model.base)
    reference_files = (
        find_model(config.reference.path, config.reference.base) if config.reference.path else policy_files
    )
    checks.check_start(config, has_adapters=policy_files.adapter is not None)
    architecture = read_config(policy_files.weights)
    reference = architecture if reference_files == policy_files else read_config(reference_files.weights)
    checks.check_models(config, architecture, reference)
    checks.check_output_head(config, is_reward_model(policy_files))
    tokenizer, controls, index = read_feedback(config, policy_files, architecture.vocab_size, scratch)
    vocab_size = grown_vocab(config, architecture.vocab_size, tokenizer)
    architecture = dataclasses.replace(architecture, vocab_size=vocab_size)
    checks.check_judges(config, index)
    checks.check_sampled(config, objective)
    num_desirable, num_undesirable = count_visits(index)
    objective = make_objective(config.objective, num_desirable=num_desirable, num_undesirable=num_undesirable)
    schedule, held_out = make_schedules(config, index, objective, controls)
    checks.check_held_out(config, is_held_out=held_out is not None)
    return Inputs(
        policy_files=policy_files,
        reference_files=reference_files,
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
    config: Config, files: ModelFiles, vocab_size: int, scratch: Path
) -> tuple[TokenizerInfo, Controls | None, Index]:
    """Prepares the tokenizer and tokenizes the feedback for training.

    Args:
      config: the run.
      files: files of the policy's initial weights.
      vocab_size: of the model's files.
      scratch: folder for the tokenizer; must exist as long as the tokenizer is used.

    Returns:
      The tokenizer; the ids before undesirable and desirable completions, None without control texts; the index.

    Raises:
      ConfigError: the tokenizer, its chat template or the feedback cannot be used.
    """
    data = config.data
    tokenizer = prepare_tokenizer(
        files.tokenizer,
        scratch / "tokenizer",
        chat_template=data.chat_template,
        eos_token=data.eos_token,
        rendering=rendering_of(data),
        added_tokens=config.model.added_tokens,
    )
    vocab_size = grown_vocab(config, vocab_size, tokenizer)
    # An adapter has a tokenizer, and no sampling defaults.
    defaults = files.weights / GENERATION
    if files.tokenizer == files.adapter and defaults.is_file() and not (files.tokenizer / GENERATION).is_file():
        shutil.copyfile(defaults, tokenizer.directory / GENERATION)
    controls = _encode_controls(check_objective(config.objective), tokenizer, vocab_size)
    longest_control = max(map(len, controls)) if controls else 0
    index = build_index(
        # Leaves room for the control text between prompt and completion.
        dataclasses.replace(data, max_length=data.max_length - longest_control),
        tokenizer,
        vocab_size=vocab_size,
        directory=cache_directory() / "indices",
        # Asking for the process index uses the devices, so only runs of several processes do it.
        builds=processes.is_first(),
    )
    return tokenizer, controls, index


def grown_vocab(config: Config, vocab_size: int, tokenizer: TokenizerInfo) -> int:
    """The size of the policy's vocabulary.

    Args:
      config: the run.
      vocab_size: of the model's files.
      tokenizer: the run's.

    Raises:
      ConfigError: tokens are added beyond it, and it may not grow.
    """
    multiple = config.model.grow_vocab
    if multiple:
        return -(-max(vocab_size, tokenizer.vocab_size) // multiple) * multiple
    if config.model.added_tokens and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"config.model.added_tokens={config.model.added_tokens!r} get ids up to {tokenizer.vocab_size - 1}, and "
            f"the model's vocabulary ends at {vocab_size - 1}. All ids must be in it. Set config.model.grow_vocab=1, "
            "which gives them rows."
        )
    return vocab_size


def count_visits(index: Index) -> tuple[int, int]:
    """Number of desirable and of undesirable completions per epoch, averaged over epochs."""
    visits = Visits(index.sequences("train"), index.places[:, 0], weights_of(index.manifest), seed=0)
    desirable = np.asarray(index.desirable)
    return round(visits.total(desirable)), round(visits.total(~desirable))


def make_schedules(
    config: Config, index: Index, objective: Objective, controls: Controls | None
) -> tuple[Schedule, Schedule | None]:
    """The batches of training and of evaluation; the latter is None if no example is held out."""
    paired = objective.reads == "pairs"
    train, weights = _sequences_to_train(index, objective), weights_of(index.manifest)
    visits = Visits(train, index.places[:, 0], weights, seed=config.seed)
    limits = _row_limits(config, index, visits.at(np.arange(len(visits)), 0), paired)
    kind: dict[str, Any] = {"paired": paired, "unmatched": objective.first_pass == "unmatched"}
    kind |= {"reads_sampled": objective.reads_sampled, "slots_for_any": config.data.sampled_tokens}
    order = Order(config.batch_size, config.seed, config.epochs, weights=weights)
    schedule = Schedule(index, train, order, limits, controls=controls, **kind)
    held_out = _sequences_to_evaluate(config, index, objective)
    if not len(held_out):
        return schedule, None
    once = Order(config.batch_size, config.seed, shuffle=False)
    good = controls and (controls[1], controls[1])
    return schedule, Schedule(index, held_out, once, limits, controls=good, **kind)


def _row_limits(config: Config, index: Index, visited: np.ndarray, paired: bool) -> RowLimits:
    # "auto" rows are chosen later (planning/rows_that_fit.py), by compiling schedules of one row and more.
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
    """Lengths of packed rows in tokens: as configured, the longest example's, or a few that minimise padding.

    Args:
      config: the run.
      index: the run's feedback.
      visited: sequences of an epoch; with `paired`, the chosen ones.
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
    """The sequences of an epoch: all, the desirable ones, or the chosen ones of pairs.

    Raises:
      ConfigError: there are none, or all have the same label and both are needed.
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
        "config.data.label_field and label_map, score_rule and score_threshold for scores, or set "
        "config.objective.name to sft for demonstrations."
    )


def _sequences_to_evaluate(config: Config, index: Index, objective: Objective) -> np.ndarray:
    """The held-out sequences of an evaluation; empty if none of them counts as an example."""
    held_out = index.pairs("eval") if objective.reads == "pairs" else index.sequences("eval")
    # Files are often sorted by prompt or label: the first ones would be a biased sample without partners.
    held_out = held_out[permute(np.arange(len(held_out)), max(len(held_out), 1), (0,))]
    held_out = held_out[: config.evaluation.max_examples] if config.evaluation.max_examples else held_out
    measured = objective.evaluated_as or objective
    counts = measured.counts(np.ones(len(held_out), bool), np.asarray(index.desirable)[held_out])
    return held_out if np.any(counts) else held_out[:0]


def _encode_controls(objective: Objective, tokenizer: TokenizerInfo, vocab_size: int) -> Controls | None:
    """Ids of the objective's control texts, if it has any.

    Raises:
      ConfigError: a text has no tokens, or tokens outside the model's vocabulary.
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
