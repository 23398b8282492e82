"""Feedback made of rewards: thumbs by a threshold, or the best and the worst completion of each prompt.

The rows have the shapes of the HALOs code (`data.layout="halos"`), with the reward, the prompt and the round beside
them, so that every round can be trained on again, and the token ids that were sampled, which are what is trained on.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kto_jax.config import ConfigError

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


def rewarded(rollout: Iterable[Row], dropped: collections.Counter[str]) -> list[Row]:
    """The rows to which a reward applies; the others are counted."""
    rows = list(rollout)
    found = [row for row in rows if row["reward"] is not None]
    if len(found) < len(rows):
        dropped["no reward applies"] = len(rows) - len(found)
    return found


def usable_rows(
    rows: Iterable[Row], dropped: collections.Counter[str], keep_cut: bool, *, allow_empty: bool = False
) -> list[Row | None]:
    """The rows, None in place of those that cannot be trained on, which are counted."""
    found: list[Row | None] = []
    for row in rows:
        reason = "" if row["ended"] or keep_cut else "cut before its end"
        reason = reason or ("" if row["completion"].strip() or allow_empty else "empty")
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
      keep_cut: use completions that were cut before their end, as they are: without an EOS.
    """
    dropped: collections.Counter[str] = collections.Counter()
    known = rewarded(rollout, dropped)
    usable = [row for row in usable_rows(known, dropped, keep_cut) if row is not None]
    rows = _pairs(usable, dropped) if pairs else _thumbs(usable, rule, dropped)
    desirable = len(rows) if pairs else sum(row["label"] for row in rows)
    return Labelled(rows, desirable, dict(dropped))


def by_prompt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each prompt."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return groups


def _thumbs(rows: Sequence[Row], rule: str | float, dropped: collections.Counter[str]) -> list[Row]:
    if not rows:
        return []
    rewards = [row["reward"] for row in rows]
    of_round = {"mean": float(np.mean(rewards)), "median": float(np.median(rewards))}
    of_prompt = {key: float(np.mean([row["reward"] for row in group])) for key, group in by_prompt(rows).items()}
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
        shape |= ids_of(row)
        found.append(
            shape | {"label": int(row["reward"] >= float(threshold))} | beside(row) | {"reward": row["reward"]}
        )
    return found


def _pairs(rows: Sequence[Row], dropped: collections.Counter[str]) -> list[Row]:
    found = []
    for group in by_prompt(rows).values():
        best, worst = max(group, key=lambda row: row["reward"]), min(group, key=lambda row: row["reward"])
        if best["reward"] == worst["reward"] or best["completion_ids"] == worst["completion_ids"]:
            dropped["of a prompt without a best and a worst"] += len(group)
            continue
        dropped["neither best nor worst"] += len(group) - 2
        shape = {"type": "pairwise_feedback", "prompt": best["prompt"], "output_A": best["completion"]}
        shape |= {"output_B": worst["completion"], "label": 1}
        shape |= ids_of(best, "output_A") | ids_of(worst, "output_B")
        found.append(shape | beside(best) | {"reward_A": best["reward"], "reward_B": worst["reward"]})
    return found


def ids_of(row: Row, column: str = "output") -> Row:
    """The token ids of a row, as `data.sampled_tokens` reads them."""
    return {"prompt_ids": row["prompt_ids"], f"{column}_ids": row["completion_ids"]}


def beside(row: Row) -> Row:
    """What every row of feedback says about its place in the run."""
    return {name: row[name] for name in ("prompt_id", "sample", "round")}
