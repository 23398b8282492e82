"""What a run reads, checked and ready before any device is touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax import judges
from kto_jax.config import Config, ConfigError
from kto_jax.data.batches import Plan
from kto_jax.data.index import Index, build_index
from kto_jax.data.permutation import permute
from kto_jax.data.tokenize import TokenizerInfo, prepare_tokenizer
from kto_jax.models.config import TransformerConfig
from kto_jax.models.huggingface import read_config
from kto_jax.objectives import Objective, check_objective, make_objective
from kto_jax.sources import cache_directory, local_path


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A run's inputs.

    Attributes:
      model_path: where the policy's first weights are.
      reference_path: where the reference's are.
      architecture: of both.
      tokenizer: of the policy.
      index: the feedback.
      plan: what each step reads.
      held_out: what each evaluation reads; None where nothing is held out.
      num_steps: steps of the run.
      objective: what is minimised, its weights resolved from the counts.
      num_desirable: examples to train on.
      num_undesirable: likewise.
    """

    model_path: Path
    reference_path: Path
    architecture: TransformerConfig
    tokenizer: TokenizerInfo
    index: Index
    plan: Plan
    held_out: Plan | None
    num_steps: int
    objective: Objective
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
    check_objective(config.objective)
    judges.check_names(config.samples.judges)
    model_path = local_path(config.model.path)
    reference_path = local_path(config.reference.path) if config.reference.path else model_path
    architecture = read_config(model_path)
    _check_model(config, architecture, architecture if reference_path == model_path else read_config(reference_path))
    tokenizer = prepare_tokenizer(model_path, scratch / "tokenizer", chat_template=config.data.chat_template)
    index = build_index(
        config.data, tokenizer, vocab_size=architecture.vocab_size, directory=cache_directory() / "indices"
    )
    _check_judges(config, index)
    plan, held_out = make_plans(config, index)
    labels = np.asarray(index.desirable)[index.rows("train")]
    num_desirable, num_undesirable = int(labels.sum()), int((~labels).sum())
    return Inputs(
        model_path=model_path,
        reference_path=reference_path,
        architecture=architecture,
        tokenizer=tokenizer,
        index=index,
        plan=plan,
        held_out=held_out,
        num_steps=min(plan.num_steps, config.max_steps) if config.max_steps else plan.num_steps,
        objective=make_objective(config.objective, num_desirable=num_desirable, num_undesirable=num_undesirable),
        num_desirable=num_desirable,
        num_undesirable=num_undesirable,
    )


def make_plans(config: Config, index: Index) -> tuple[Plan, Plan | None]:
    """What each step reads, and each evaluation; None where nothing is held out."""
    row_length = config.row_length or config.data.max_length
    shape: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "row_length": row_length,
        "microbatch_rows": config.microbatch_rows,
        "completion_length": max(1, round(row_length * config.completion_share)),
        "max_length": config.data.max_length,
    }
    held_out = index.rows("eval")
    if len(held_out):
        # Files are often sorted by prompt or label: the first rows would be no fair draw, and find no partners.
        held_out = held_out[permute(np.arange(len(held_out)), len(held_out), (0,))]
    held_out = held_out[: config.evaluation.max_examples] if config.evaluation.max_examples else held_out
    evaluation = Plan(index, held_out, epochs=1, shuffle=False, **shape) if len(held_out) else None
    return Plan(index, index.rows("train"), epochs=config.epochs, **shape), evaluation


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
    unrelated = ("bos_id", "eos_ids", "max_length", "initializer_range")
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
