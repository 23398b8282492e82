"""Feedback made of rewards: thumbs by a threshold, the best and the worst completion of each prompt, or advantages.

The rows have the shapes of the HALOs code (`data.layout="halos"`), with the reward, the prompt and the round beside
them, so that every round can be trained on again.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kto_jax.config import ConfigError
from kto_jax.losses import group_relative_advantages, leave_one_out_advantages

Row = dict[str, Any]

RULES = ("mean", "median", "prompt_mean")
"""Thresholds by name; a number is one too."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The feedback of a round.

    Attributes:
      rows: the feedback.
      desirable: completions that became desirable or chosen, or have a positive advantage.
      dropped: reason -> number of completions that became no feedback.
    """

    rows: list[Row]
    desirable: int
    dropped: dict[str, int]


def check_rule(rule: str) -> str | float:
    """The rule, a number if it is one.

    Raises:
      ConfigError: it is neither a name nor a finite number.
    """
    if rule in RULES:
        return rule
    try:
        threshold = float(rule)
    except ValueError:
        threshold = math.nan
    if math.isfinite(threshold):
        return threshold
    raise ConfigError(f"--label={rule!r} is no rule. Allowed: {', '.join(RULES)} or a number. Set --label.")


def advantages(rollout: Iterable[Row], *, kind: str, drop_equal: bool, keep_cut: bool) -> Labelled:
    """Turns completions and their rewards into completions with advantages, relative to those of the same prompt.

    Args:
      rollout: as for `label`. Completions that are cut or empty count in the mean of their prompt, also if they are not
        used.
      kind: as `Objective.advantages`.
      drop_equal: leave out prompts all of whose completions have the same reward, as DAPO does.
      keep_cut: as for `label`.
    """
    dropped: collections.Counter[str] = collections.Counter()
    rewarded = _rewarded(rollout, dropped)
    found = []
    for group in _by_prompt(rewarded).values():
        rewards = np.asarray([row["reward"] for row in group])
        if len(group) < 2 or (drop_equal and np.ptp(rewards) == 0):
            dropped["of a prompt without different rewards"] += len(group)
            continue
        for row, value in zip(_usable(group, dropped, keep_cut), _advantages(rewards, kind), strict=True):
            if row is not None:
                shape = {"type": "scalar_feedback", "prompt": row["prompt"], "output": row["completion"]}
                found.append(shape | {"reward": float(value)} | _beside(row) | {"own_reward": row["reward"]})
    return Labelled(found, sum(row["reward"] > 0 for row in found), dict(dropped))


def _advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    given = jnp.asarray(rewards, jnp.float32)
    if kind == "leave_one_out":
        return np.asarray(leave_one_out_advantages(given), np.float64)
    return np.asarray(group_relative_advantages(given, scale=kind == "scaled_group"), np.float64)


def _rewarded(rollout: Iterable[Row], dropped: collections.Counter[str]) -> list[Row]:
    rows = list(rollout)
    found = [row for row in rows if row["reward"] is not None]
    if len(found) < len(rows):
        dropped["no reward applies"] = len(rows) - len(found)
    return found


def _usable(rows: Iterable[Row], dropped: collections.Counter[str], keep_cut: bool) -> list[Row | None]:
    """The rows, None in place of those that cannot be trained on, which are counted."""
    found: list[Row | None] = []
    for row in rows:
        reason = "" if row["ended"] or keep_cut else "cut before its end"
        reason = reason or ("" if row["completion"].strip() else "empty")
        dropped.update([reason] if reason else [])
        found.append(None if reason else row)
    return found


def label(rollout: Iterable[Row], *, pairs: bool, rule: str | float, keep_cut: bool) -> Labelled:
    """Turns completions and their rewards into feedback.

    Args:
      rollout: rows of prompt, completion, reward (None where none applies), ended, prompt_id, sample and round.
      pairs: make pairs of the best and the worst completion of each prompt; else thumbs.
      rule: what a reward must exceed to be desirable: the mean or the median of the round, the mean of the prompt's own
        completions, or a number, which it may also equal. Completions that equal a mean or median are dropped.
      keep_cut: use completions that were cut before their end, which are then trained on as if they ended there.
    """
    dropped: collections.Counter[str] = collections.Counter()
    rewarded = _rewarded(rollout, dropped)
    usable = [row for row in _usable(rewarded, dropped, keep_cut) if row is not None]
    rows = _pairs(usable, dropped) if pairs else _thumbs(usable, rule, dropped)
    desirable = len(rows) if pairs else sum(row["label"] for row in rows)
    return Labelled(rows, desirable, dict(dropped))


def _by_prompt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return groups


def _thumbs(rows: Sequence[Row], rule: str | float, dropped: collections.Counter[str]) -> list[Row]:
    if not rows:
        return []
    rewards = [row["reward"] for row in rows]
    of_round = {"mean": float(np.mean(rewards)), "median": float(np.median(rewards))}
    of_prompt = {key: float(np.mean([row["reward"] for row in group])) for key, group in _by_prompt(rows).items()}
    found = []
    for row in rows:
        threshold = rule
        if isinstance(rule, str):
            threshold = of_prompt[row["prompt_id"]] if rule == "prompt_mean" else of_round[rule]
            # Equal rewards differ from their mean by rounding.
            if math.isclose(row["reward"], threshold, rel_tol=1e-9, abs_tol=1e-12):
                dropped[f"equals the {rule.replace('_', ' ')}"] += 1
                continue
        shape = {"type": "binary_feedback", "prompt": row["prompt"], "output": row["completion"]}
        found.append(
            shape | {"label": int(row["reward"] >= float(threshold))} | _beside(row) | {"reward": row["reward"]}
        )
    return found


def _pairs(rows: Sequence[Row], dropped: collections.Counter[str]) -> list[Row]:
    found = []
    for group in _by_prompt(rows).values():
        best, worst = max(group, key=lambda row: row["reward"]), min(group, key=lambda row: row["reward"])
        if best["reward"] == worst["reward"] or best["completion"] == worst["completion"]:
            dropped["of a prompt without a best and a worst"] += len(group)
            continue
        dropped["neither best nor worst"] += len(group) - 2
        shape = {"type": "pairwise_feedback", "prompt": best["prompt"], "output_A": best["completion"]}
        shape |= {"output_B": worst["completion"], "label": 1}
        found.append(shape | _beside(best) | {"reward_A": best["reward"], "reward_B": worst["reward"]})
    return found


def _beside(row: Row) -> Row:
    return {name: row[name] for name in ("prompt_id", "sample", "round")}
