"""One round of online training: the policy completes prompts, rewards score the completions, and they become feedback.

A round's completions are a function of the policy, the seed, the round, the prompt and the sample, and are written at
once with their rewards: a run that is killed samples them again, or never.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.devices import processes
from kto_jax.rewards.functions import RewardFunction, Scored, total_rewards
from kto_jax.rewards.messages import as_completion
from kto_jax.rollouts.advantages import as_numbers
from kto_jax.rollouts.prompts import PromptRow
from kto_jax.sampling.complete import Completion, LanguageModel, complete
from kto_jax.sampling.endpoint import SamplingEndpoint
from kto_jax.sampling.sample import Sampling
from kto_jax.storage.atomic import write_text

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How completions are sampled and scored.

    Attributes:
      sampling: how tokens are drawn.
      num_samples: completions of each prompt.
      batch_size: completions sampled at once.
      rewards: what scores them.
      timeout: seconds that each reward may take.
      endpoint: a server that samples; None samples here.
    """

    sampling: Sampling
    num_samples: int
    batch_size: int
    rewards: Sequence[RewardFunction]
    timeout: float
    endpoint: SamplingEndpoint | None = None


def sample_round(
    model: LanguageModel | None,
    prompts: Sequence[PromptRow],
    rollout: Rollout,
    *,
    number: int,
    seed: int,
    path: Path,
    part: int = 0,
) -> list[Row]:
    """Completes the prompts of a round, scores the completions and writes both to a JSONL file.

    Completions that are in the file already, without rewards, are scored and not sampled again; with rewards, they are
    only read.

    Args:
      model: the policy; None on a process that does not sample.
      prompts: of the round.
      rollout: how.
      number: of the round.
      seed: of the run.
      path: the file.
      part: of the round, if it samples in several.

    All processes must make this call; those that do not sample pass no model, and read the file.

    Returns:
      A row for each completion: prompt, completion, prompt_id, sample, round, num_tokens, ended, prompt_ids,
      completion_ids, logps (as the sampler computed them), reward, rewards.

    Raises:
      ConfigError: a prompt does not fit the model's context, or a reward cannot be used.
      TransientError: a reward does not return in time.
    """
    if not processes.broadcast_bool(path.exists()):
        drawn = _draw(model, prompts, rollout, _seed_of(seed, number, part), path)
        processes.on_first(lambda: _write(path, _rows_of(drawn or [], prompts, rollout, number)))
    processes.on_first(lambda: _score(path, prompts, rollout))
    return _read(path)


def _score(path: Path, prompts: Sequence[PromptRow], rollout: Rollout) -> None:
    """Adds rewards to the completions in a file that has none."""
    rows = _read(path)
    if any("reward" not in row for row in rows):
        _write(path, _with_rewards(rows, prompts, rollout, path.with_suffix(".answers.jsonl")))


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _draw(
    model: LanguageModel | None, prompts: Sequence[PromptRow], rollout: Rollout, seed: int, path: Path
) -> list[Completion] | None:
    """The completions; None on a process that has none."""
    asked, endpoint = [row.prompt for row in prompts], rollout.endpoint
    if endpoint is not None:
        record = path.with_suffix(".sampled.jsonl")

        def ask() -> list[Completion]:
            assert model is not None, "the first process opens the model"
            return endpoint.complete(model, asked, rollout.sampling, num_samples=rollout.num_samples, record=record)

        return processes.on_first(ask)
    if model is None:
        return None
    return complete(
        model,
        asked,
        rollout.sampling,
        num_samples=rollout.num_samples,
        seed=seed,
        batch_size=rollout.batch_size,
    )


def _rows_of(
    completions: Sequence[Completion], prompts: Sequence[PromptRow], rollout: Rollout, number: int
) -> list[Row]:
    return [
        {
            **_shown(completion),
            "prompt_id": prompts[i // rollout.num_samples].key[:16],
            "sample": i % rollout.num_samples,
            "round": number,
            "prompt_ids": completion.prompt_ids,
            "completion_ids": completion.ids,
            "logps": as_numbers(np.asarray(completion.logps)),
        }
        for i, completion in enumerate(completions)
    ]


def _shown(completion: Completion) -> Row:
    shown = {"prompt": completion.prompt, "completion": completion.text}
    return shown | {"num_tokens": completion.num_tokens, "ended": completion.ended}


def _seed_of(seed: int, number: int, part: int) -> int:
    return int(np.random.SeedSequence((seed, number, part) if part else (seed, number)).generate_state(1)[0])


def _with_rewards(rows: Sequence[Row], prompts: Sequence[PromptRow], rollout: Rollout, record: Path) -> list[Row]:
    asked = [prompts[i // rollout.num_samples] for i in range(len(rows))]
    names = dict.fromkeys(name for row in asked for name in row.columns)
    scored = Scored(
        prompts=[row.prompt for row in asked],
        completions=[as_completion(row["prompt"], row["completion"]) for row in rows],
        completion_ids=[row["completion_ids"] for row in rows],
        ended=[row["ended"] for row in rows],
        columns={name: [row.columns.get(name) for row in asked] for name in names},
        places=[row.place for row in asked],
        record=record,
    )
    sums, alone = total_rewards(rollout.rewards, scored, rollout.timeout)
    return [
        {**row, "reward": sums[i], "rewards": {name: values[i] for name, values in alone.items()}}
        for i, row in enumerate(rows)
    ]


def check_feedback(rows: Sequence[Row], *, needs_both: bool, number: int, dropped: str) -> None:
    """Refuses a round without anything to learn.

    Raises:
      ConfigError: there are no rows, or thumbs of one kind where both are needed.
    """
    labels = {row.get("label") for row in rows}
    if rows and (not needs_both or len(labels) == 2):
        return
    what = "no feedback" if not rows else f"only {'desirable' if 1 in labels else 'undesirable'} completions"
    raise ConfigError(
        f"round {number} gives {what}{f' ({dropped})' if dropped else ''}. A round needs completions of different "
        "rewards. Raise --prompts_per_round, --num_samples or --max_new_tokens, or change --reward or --label."
    )
