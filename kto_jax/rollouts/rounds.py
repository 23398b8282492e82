"""One round of online training: the policy completes prompts, rewards score the completions, and they become feedback.

A round's completions are a function of the policy, the seed, the round, the prompt and the sample, and are written at
once with their rewards: a run that is killed samples them again, or never.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.rewards.functions import RewardFunction, Scored, total_rewards
from kto_jax.rewards.messages import as_completion
from kto_jax.rollouts.prompts import PromptRow
from kto_jax.sampling.complete import Completion, LanguageModel, complete
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
    """

    sampling: Sampling
    num_samples: int
    batch_size: int
    rewards: Sequence[RewardFunction]
    timeout: float


def sample_round(
    model: LanguageModel, prompts: Sequence[PromptRow], rollout: Rollout, *, number: int, seed: int, path: Path
) -> list[Row]:
    """Completes the prompts of a round, scores the completions and writes both to a JSONL file.

    Completions that are in the file already, without rewards, are scored and not sampled again; with rewards, they are
    only read.

    Args:
      model: the policy.
      prompts: of the round.
      rollout: how.
      number: of the round.
      seed: of the run.
      path: the file.

    Returns:
      A row for each completion: prompt, completion, prompt_id, sample, round, num_tokens, ended, reward, rewards.

    Raises:
      ConfigError: a prompt does not fit the model's context, or a reward cannot be used.
      TransientError: a reward does not return in time.
    """
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        rows = _sample(model, prompts, rollout, number, seed)
        _write(path, rows)
    if any("reward" not in row for row in rows):
        rows = _with_rewards(rows, prompts, rollout)
        _write(path, rows)
    return [{name: value for name, value in row.items() if name != "ids"} for row in rows]


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _sample(model: LanguageModel, prompts: Sequence[PromptRow], rollout: Rollout, number: int, seed: int) -> list[Row]:
    completions = complete(
        model,
        [row.prompt for row in prompts],
        rollout.sampling,
        num_samples=rollout.num_samples,
        seed=_seed_of_round(seed, number),
        batch_size=rollout.batch_size,
    )
    return [
        {
            **_shown(completion),
            "prompt_id": prompts[i // rollout.num_samples].key[:16],
            "sample": i % rollout.num_samples,
            "round": number,
            "ids": completion.ids,
        }
        for i, completion in enumerate(completions)
    ]


def _shown(completion: Completion) -> Row:
    shown = {"prompt": completion.prompt, "completion": completion.text}
    return shown | {"num_tokens": completion.num_tokens, "ended": completion.ended}


def _seed_of_round(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _with_rewards(rows: Sequence[Row], prompts: Sequence[PromptRow], rollout: Rollout) -> list[Row]:
    asked = [prompts[i // rollout.num_samples] for i in range(len(rows))]
    names = dict.fromkeys(name for row in asked for name in row.columns)
    scored = Scored(
        prompts=[row.prompt for row in asked],
        completions=[as_completion(row["prompt"], row["completion"]) for row in rows],
        completion_ids=[row["ids"] for row in rows],
        ended=[row["ended"] for row in rows],
        columns={name: [row.columns.get(name) for row in asked] for name in names},
        places=[row.place for row in asked],
    )
    sums, alone = total_rewards(rollout.rewards, scored, rollout.timeout)
    return [
        {**row, "reward": sums[i], "rewards": {name: values[i] for name, values in alone.items()}}
        for i, row in enumerate(rows)
    ]


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """Figures of a round's completions.

    Returns:
      completions; reward, the mean, and reward_error, the standard error of it over prompts; reward/NAME, the mean of
      each reward; cut, the share that reached the longest length; num_tokens, the mean length; no_spread, the share of
      prompts all of whose completions have the same reward. NaN where no reward applies.
    """
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["reward"] is not None:
            groups.setdefault(row["prompt_id"], []).append(row["reward"])
    means = [float(np.mean(group)) for group in groups.values()]
    figures = {
        "completions": float(len(rows)),
        "reward": _mean([row["reward"] for row in rows]),
        "reward_error": float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan"),
        "cut": _mean([float(not row["ended"]) for row in rows]),
        "num_tokens": _mean([row["num_tokens"] for row in rows]),
        "no_spread": _mean([float(min(group) == max(group)) for group in groups.values()]),
    }
    for name in rows[0]["rewards"]:
        figures[f"reward/{name}"] = _mean([row["rewards"][name] for row in rows])
    return figures


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def warnings_of(figures: Mapping[str, float], max_new_tokens: int) -> list[str]:
    """Sentences on what keeps a round from teaching anything, each with what to do."""
    found = []
    if figures["cut"] > 0.5:
        found.append(
            f"{figures['cut']:.0%} of the completions were cut at {max_new_tokens} tokens: raise --max_new_tokens"
        )
    if figures["no_spread"] > 0.9:
        found.append(
            f"for {figures['no_spread']:.0%} of the prompts all completions have the same reward: raise --num_samples, "
            "or choose prompts or rewards that the policy sometimes fails and sometimes meets"
        )
    return found


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
