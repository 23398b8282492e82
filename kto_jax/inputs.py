"""What a run reads, checked and ready before any device is touched."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax import judges
from kto_jax.config import Config, ConfigError
from kto_jax.data.batches import Plan
from kto_jax.data.index import Index, build_index
from kto_jax.data.tokenize import TokenizerInfo, prepare_tokenizer
from kto_jax.models.config import TransformerConfig
from kto_jax.models.huggingface import read_config
from kto_jax.objectives import Objective, check_objective, make_objective
from kto_jax.run import RunFolder, open_run
from kto_jax.sources import cache_directory, local_path


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A run's inputs.

    Attributes:
      run: its folder, held by this process.
      model_path: where the policy's first weights are.
      reference_path: where the reference's are.
      architecture: of both.
      tokenizer: the run's own copy.
      index: the feedback.
      plan: what each step reads.
      held_out: what each evaluation reads; None where nothing is held out.
      num_steps: steps of the run.
      objective: what is minimised, its weights resolved from the counts.
      num_desirable: examples to train on.
      num_undesirable: likewise.
    """

    run: RunFolder
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


def read_inputs(config: Config, workdir: Path) -> Inputs:
    """Finds the model, tokenizes the feedback, and opens the run's folder last, when all else is known to be good.

    Raises:
      ConfigError: the configuration, the data, the model or the folder cannot be used.
    """
    check_objective(config.objective)
    judges.check_names(config.samples.judges)
    model_path = local_path(config.model.path)
    reference_path = local_path(config.reference.path) if config.reference.path else model_path
    architecture = read_config(model_path)
    _check_model(config, architecture, architecture if reference_path == model_path else read_config(reference_path))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = prepare_tokenizer(model_path, Path(scratch) / "tokenizer", chat_template=config.data.chat_template)
        index = build_index(
            config.data, tokenizer, vocab_size=architecture.vocab_size, directory=cache_directory() / "indices"
        )
        plan, held_out = make_plans(config, index)
        labels = np.asarray(index.desirable)[index.rows("train")]
        num_desirable, num_undesirable = int(labels.sum()), int((~labels).sum())
        objective = make_objective(config.objective, num_desirable=num_desirable, num_undesirable=num_undesirable)
        run = open_run(workdir, config, index, tokenizer, architecture)
    return Inputs(
        run=run,
        model_path=model_path,
        reference_path=reference_path,
        architecture=architecture,
        tokenizer=run.tokenizer,
        index=index,
        plan=plan,
        held_out=held_out,
        num_steps=min(plan.num_steps, config.max_steps) if config.max_steps else plan.num_steps,
        objective=objective,
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
    held_out = held_out[: config.evaluation.max_examples] if config.evaluation.max_examples else held_out
    evaluation = Plan(index, held_out, epochs=1, shuffle=False, **shape) if len(held_out) else None
    return Plan(index, index.rows("train"), epochs=config.epochs, **shape), evaluation


def _check_model(config: Config, policy: TransformerConfig, reference: TransformerConfig) -> None:
    """Refuses lengths beyond the model's context, and a reference of another architecture.

    Raises:
      ConfigError: naming both sides.
    """
    if config.data.max_length > policy.max_length:
        raise ConfigError(
            f"config.data.max_length={config.data.max_length} is beyond the model's context of {policy.max_length} "
            f"tokens. Allowed: up to {policy.max_length}. Set config.data.max_length."
        )
    if reference != policy:
        differing = [
            f"{field.name} {getattr(reference, field.name)!r} against {getattr(policy, field.name)!r}"
            for field in dataclasses.fields(policy)
            if getattr(reference, field.name) != getattr(policy, field.name)
        ]
        raise ConfigError(
            f"config.reference.path={config.reference.path!r} is of another architecture than the policy: "
            f"{', '.join(differing)}. Both must be equal. Set config.reference.path."
        )
