"""Feedback of the policy-gradient objectives: completions with old log-probabilities and an advantage of each token."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kto_jax import losses
from kto_jax.objectives.record import Advantages
from kto_jax.rollouts.figures import importance_weights, kl_of_tokens
from kto_jax.rollouts.labels import Labelled, Row, beside, by_prompt, ids_of, rewarded, usable_rows

Figures = Mapping[str, Sequence[np.ndarray]]
"""Of each completion: old_logps, reference_logps and values, one array [completion] each."""


def advantages(
    rollout: Sequence[Row],
    figures: Figures,
    rule: Advantages,
    *,
    keep_cut: bool,
    spread_of: str = "",
    weight_cap: float = 0.0,
) -> Labelled:
    """Turns completions and their rewards into rows of tokens with advantages.

    Completions that are cut count in the mean of their prompt, also if they are not used.

    Args:
      rollout: as for `label`.
      figures: of the completions, in the same order.
      rule: how.
      keep_cut: as for `label`.
      spread_of: the reward that must differ between the completions of a prompt, if `rule` drops equal ones; empty for
        the sum.
      weight_cap: largest weight of a token of a policy other than the trained one, by which its advantage, and with it
        its loss, is multiplied; 0 weighs none. `figures` then holds sampled_logps.
    """
    dropped: collections.Counter[str] = collections.Counter()
    numbered = [{**row, "number": number} for number, row in enumerate(rollout)]
    groups = by_prompt(rewarded(numbered, dropped)).values()
    kept: list[Row] = []
    for group in groups:
        if rule.kind != "gae" and (len(group) < 2 or (rule.drop_equal and not has_spread(group, spread_of))):
            dropped["of a prompt without different rewards"] += len(group)
        else:
            kept += group
    by_row = _by_token(kept, figures, rule)
    usable = usable_rows(kept, dropped, keep_cut, allow_empty=True)
    found = [
        _row(row, figures, _weighted(tokens, row["number"], figures, weight_cap))
        for row, tokens in zip(usable, _scaled(by_row, kept, rule), strict=True)
        if row is not None
    ]
    return Labelled(found, sum(row["reward"] > 0 for row in found), dict(dropped))


def has_spread(rows: Sequence[Row], name: str = "") -> bool:
    """Whether the completions of a prompt differ in a reward, or in the sum of rewards if it has no name."""
    values = [row["rewards"][name] if name else row["reward"] for row in rows]
    return len({value for value in values if value is not None}) > 1


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Advantages and returns of a completion's tokens."""

    advantages: np.ndarray
    returns: np.ndarray


def _by_token(rows: Sequence[Row], figures: Figures, rule: Advantages) -> list[_Tokens]:
    """Before they are divided by the standard deviation of the round."""
    if rule.kind == "gae":
        return [_estimated(row, figures, rule) for row in rows]
    found: dict[int, float] = {}
    for group in by_prompt(rows).values():
        rewards = np.array([row["reward"] - _penalty(row["number"], figures, rule).sum() for row in group])
        found |= dict(zip((row["number"] for row in group), _of_group(rewards, rule), strict=True))
    lengths = [len(row["completion_ids"]) for row in rows]
    spread = [np.full(count, found[row["number"]]) for row, count in zip(rows, lengths, strict=True)]
    return [_Tokens(each, np.zeros_like(each)) for each in spread]


def _of_group(rewards: np.ndarray, rule: Advantages) -> np.ndarray:
    if np.ptp(rewards) == 0:
        return np.zeros(len(rewards))  # Equal rewards differ from their mean by rounding.
    given = jnp.asarray(rewards, jnp.float32)
    if rule.kind == "leave_one_out":
        found = losses.leave_one_out_advantages(given)
    else:
        found = losses.group_relative_advantages(given, scale=False)
    if rule.scale == "group":
        found = found / (jnp.std(given) + 1e-4)
    return np.asarray(found, np.float64)


def _penalty(number: int, figures: Figures, rule: Advantages) -> np.ndarray:
    """The weighted KL of each token, which is subtracted from its reward [completion]."""
    old, reference = figures["old_logps"][number], figures["reference_logps"][number]
    if not rule.kl_weight:
        return np.zeros(len(old))
    return rule.kl_weight * kl_of_tokens(old, reference, rule.kl_estimator).astype(np.float64)


def _estimated(row: Row, figures: Figures, rule: Advantages) -> _Tokens:
    """Generalised advantage estimation: the reward is on the last token, the KL on every one."""
    rewards = -_penalty(row["number"], figures, rule)
    rewards[-1] += row["reward"]
    values = np.asarray(figures["values"][row["number"]], np.float64)
    found, later = np.zeros(len(rewards)), 0.0
    for token in range(len(rewards) - 1, -1, -1):
        next_value = values[token + 1] if token + 1 < len(values) else 0.0
        delta = rewards[token] + rule.discount * next_value - values[token]
        found[token] = later = delta + rule.discount * rule.trace * later
    return _Tokens(found, found + values)


def _scaled(tokens: Sequence[_Tokens], rows: Sequence[Row], rule: Advantages) -> list[_Tokens]:
    if rule.scale != "batch" or not rows:
        return list(tokens)
    if rule.kind == "gae":
        everything = np.concatenate([each.advantages for each in tokens])
        mean, deviation = everything.mean(), everything.std() + 1e-8
    else:
        mean, deviation = 0.0, np.std([row["reward"] for row in rows]) + 1e-4
    return [dataclasses.replace(each, advantages=(each.advantages - mean) / deviation) for each in tokens]


def _weighted(tokens: _Tokens, number: int, figures: Figures, cap: float) -> _Tokens:
    """Every surrogate is linear in the advantage, so that weights of the loss are weights of the advantage."""
    if not cap:
        return tokens
    weights = importance_weights(figures["old_logps"][number], figures["sampled_logps"][number], cap)
    return dataclasses.replace(tokens, advantages=tokens.advantages * weights)


def _row(row: Row, figures: Figures, tokens: _Tokens) -> dict[str, Any]:
    number = row["number"]
    by_token = {name: figures[name][number] for name in ("old_logps", "reference_logps", "values")}
    by_token |= {"advantages": tokens.advantages, "returns": tokens.returns}
    return {
        "type": "scalar_feedback",
        "prompt": row["prompt"],
        "output": row["completion"],
        "reward": float(np.mean(tokens.advantages)),
        **beside(row),
        "own_reward": row["reward"],
        **ids_of(row),
        **{name: as_numbers(values) for name, values in by_token.items()},
    }


def as_numbers(values: np.ndarray) -> list[float]:
    """The shortest numbers that read back as the same float32."""
    return [float(str(value)) for value in np.asarray(values, np.float32)]
