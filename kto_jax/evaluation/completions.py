"""Completions of the same prompts by the models that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.evaluation.intervals import Interval, mean_interval
from kto_jax.rollouts.prompts import PromptRow
from kto_jax.sampling.complete import LanguageModel, Prompt
from kto_jax.sampling.logps import completion_logps
from kto_jax.sampling.sample import Sampling, check_prompts, sample_with_logps


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion of a prompt.

    Attributes:
      prompt: text or chat messages.
      text: the completion, without special tokens and white space around it.
      key: equal for the completions of one prompt.
      columns: the other columns of the prompt's row, for judges.
      place: `file:line` of the prompt.
      prompt_ids, ids: token ids; empty if the completion was read from a file.
      ended: whether it ended by itself; otherwise it was cut at the longest length. True if it was read from a file.
      logp: log-probability under the model that wrote it, at temperature 1, in nats; NaN if it was read from a file.
    """

    prompt: Prompt
    text: str
    key: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""
    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    ended: bool = True
    logp: float = float("nan")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is completed, and how.

    Attributes:
      rows: the prompts.
      ids: token ids of the prompts, if they are known; every model then has the same tokenizer.
      sampling: how tokens are drawn.
      num_samples: completions of each prompt.
      seed: of the sampling; equal for all models.
      batch_size: completions sampled at once.
    """

    rows: Sequence[PromptRow]
    ids: Sequence[np.ndarray] = ()
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    num_samples: int = 1
    seed: int = 0
    batch_size: int = 16


def answer(model: LanguageModel, task: Task, on_batch: Callable[[int], object] | None = None) -> list[Answer]:
    """Completes the prompts of a task with a model; the completions of one prompt are side by side.

    Raises:
      ConfigError: a prompt cannot be encoded, or does not fit the model's context.
    """
    encoded = list(task.ids) or tokenize.encode_prompts(
        model.tokenizer, [row.prompt for row in task.rows], model.workers
    )
    check_prompts(model.model.config, encoded, int(task.sampling.max_new_tokens))
    rows = [row for row in task.rows for _ in range(task.num_samples)]
    prompts = [ids for ids in encoded for _ in range(task.num_samples)]
    eos_ids = {*model.tokenizer.stop_ids, *model.model.config.eos_ids}
    sampled = sample_with_logps(
        model.model, model.decoding_params, prompts, task.sampling, eos_id=sorted(eos_ids),
        key=jax.random.key(task.seed), batch_size=max(1, min(task.batch_size, len(prompts))), on_batch=on_batch,
    )  # fmt: skip
    return [
        Answer(
            prompt=row.prompt,
            text=tokenize.decode(model.tokenizer, one.ids).strip(),
            key=row.key,
            columns=row.columns,
            place=row.place,
            prompt_ids=tuple(int(token) for token in ids),
            ids=tuple(int(token) for token in one.ids),
            ended=int(one.ids[-1]) in eos_ids,
            logp=float(np.sum(one.logps)),
        )
        for row, ids, one in zip(rows, prompts, sampled, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a model is from a baseline, on its own completions.

    Attributes:
      per_completion: mean log-ratio of a completion, in nats: at temperature 1 an unbiased estimate of KL(model ‖
        baseline) over whole completions, cut at the longest length.
      per_token: the same for a token.
    """

    per_completion: Interval
    per_token: float


def measure_divergence(answers: Sequence[Answer], baseline: LanguageModel) -> Divergence:
    """The divergence of the model that wrote some completions from a baseline with the same tokens."""
    prompts = [np.asarray(one.prompt_ids, np.int32) for one in answers]
    completions = [np.asarray(one.ids, np.int32) for one in answers]
    ratios = np.asarray([one.logp for one in answers]) - completion_logps(
        baseline.model, baseline.params, prompts, completions
    )
    tokens = sum(len(one.ids) for one in answers)
    keys = [one.key for one in answers]
    return Divergence(mean_interval(ratios, keys, bounds=None), float(ratios.sum() / max(1, tokens)))


def same_tokens(one: LanguageModel, other: LanguageModel) -> bool:
    """Whether two models give the same ids to the same text, so that log-probabilities can be compared."""
    files = [model.tokenizer.directory / "tokenizer.json" for model in (one, other)]
    return one.model.config.vocab_size == other.model.config.vocab_size and (
        files[0].read_bytes() == files[1].read_bytes()
    )
