"""Figures of a round's completions, and what to do about those that keep a round from teaching anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from kto_jax import losses
from kto_jax.shapes import power_of_two

Row = dict[str, Any]


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """Figures of a round's completions.

    Returns:
      completions; reward, the mean, and reward_error, the standard error of it over prompts; reward/NAME, the mean of
      each reward; cut, the share that reached the longest length; num_tokens, the mean length, and that of the
      completions above and below the mean reward; no_spread, the share of prompts all of whose completions have the
      same reward. NaN where no reward applies.
    """
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["reward"] is not None:
            groups.setdefault(row["prompt_id"], []).append(row["reward"])
    means = [float(np.mean(group)) for group in groups.values()]
    mean = _mean([row["reward"] for row in rows])
    known = [row for row in rows if row["reward"] is not None]
    figures = {
        "completions": float(len(rows)),
        "reward": mean,
        "reward_error": float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan"),
        "cut": _mean([float(not row["ended"]) for row in rows]),
        "num_tokens": _mean([row["num_tokens"] for row in rows]),
        "num_tokens_above": _mean([row["num_tokens"] for row in known if row["reward"] > mean]),
        "num_tokens_below": _mean([row["num_tokens"] for row in known if row["reward"] < mean]),
        "no_spread": _mean([float(min(group) == max(group)) for group in groups.values()]),
    }
    for name in rows[0]["rewards"]:
        figures[f"reward/{name}"] = _mean([row["rewards"][name] for row in rows])
    return figures


def token_figures(
    figures: Mapping[str, Sequence[np.ndarray]], temperature: float, weight_cap: float = 0.0
) -> dict[str, float]:
    """Figures of the sampled tokens, per token and in nats.

    Args:
      figures: of each completion, one array [completion] for each of sampled_logps (the sampler's), old_logps (the
        trainer's) and, if there is a reference besides, reference_logps.
      temperature: of the sampling.
      weight_cap: largest importance weight; 0 if the policy sampled itself.

    Returns:
      gap_mean and gap_max, absolute differences of the sampler's and the trainer's log-probabilities; entropy of the
      policy, estimated from its samples, at temperature 1 only; kl_k1 and kl_k3, estimates of the KL to the reference,
      and kl_completion, k1 summed over a completion; with a cap weight, the mean importance weight, and weights_cut,
      the share that the cap cuts.
    """
    old = np.concatenate(figures["old_logps"]).astype(np.float64)
    gap = np.abs(old - np.concatenate(figures["sampled_logps"]))
    found = {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}
    if temperature == 1:
        found["entropy"] = float(-old.mean())
    if weight_cap:
        sampled = np.concatenate(figures["sampled_logps"])
        found["weight"] = float(importance_weights(old, sampled, weight_cap).mean())
        found["weights_cut"] = float(np.mean(old - sampled > np.log(weight_cap)))
    if "reference_logps" in figures:
        reference = np.concatenate(figures["reference_logps"])
        found["kl_k1"] = float(kl_of_tokens(old, reference, "k1").mean(dtype=np.float64))
        found["kl_k3"] = float(kl_of_tokens(old, reference, "k3").mean(dtype=np.float64))
        found["kl_completion"] = found["kl_k1"] * len(old) / len(figures["old_logps"])
    return found


def kl_of_tokens(old: np.ndarray, reference: np.ndarray, estimator: Literal["k1", "k2", "k3"]) -> np.ndarray:
    """`losses.kl_estimate` of each token, computed on as many as the next power of two: rounds then share programs.

    Args:
      old: log-probabilities under the policy that sampled [tokens].
      reference: under the reference [tokens].
      estimator: how the KL is estimated.
    """
    room = (0, power_of_two(len(old)) - len(old))
    estimate = losses.kl_estimate(*(jnp.asarray(np.pad(x, room)) for x in (old, reference)), estimator=estimator)
    return np.asarray(estimate)[: len(old)]


def importance_weights(old: np.ndarray, sampled: np.ndarray, cap: float) -> np.ndarray:
    """Truncated importance weights of tokens: min(π_trained / π_sampled, cap), in float64.

    Args:
      old: log-probabilities under the policy that is trained, before the update [tokens].
      sampled: under the policy that sampled [tokens].
      cap: the largest weight.
    """
    return np.exp(np.minimum(old.astype(np.float64) - sampled, np.log(cap)))


def explained_variance(rows: Sequence[Row]) -> float:
    """1 − Var(returns − values) / Var(returns) of the tokens of feedback; NaN if the returns are all equal."""
    returns, values = (np.concatenate([np.asarray(row[name]) for row in rows]) for name in ("returns", "values"))
    spread = returns.var()
    return float(1 - (returns - values).var() / spread) if spread > 0 else float("nan")


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def warnings_of(figures: Mapping[str, float], *, max_new_tokens: int, dtype: str) -> list[str]:
    """Sentences on what keeps a round from teaching anything, each with what to do.

    Args:
      figures: of the round; what is absent or NaN gives no warning.
      max_new_tokens: longest completion.
      dtype: what model and sampler compute in.
    """
    gap = 1e-3 if dtype == "float32" else 0.05
    found = []

    def warn(name: str, limit: float, text: str) -> None:
        if figures.get(name, float("nan")) > limit:
            found.append(text)

    cut = figures["cut"]
    if cut == 1:
        found.append(
            f"no completion ended within {max_new_tokens} tokens: raise --max_new_tokens; if the model never ends, "
            "check config.data.chat_template"
        )
    elif cut > 0.5:
        found.append(f"{cut:.0%} of the completions were cut at {max_new_tokens} tokens: raise --max_new_tokens")
    warn(
        "no_spread",
        0.9,
        f"for {figures['no_spread']:.0%} of the prompts all completions have the same reward: raise --num_samples, or "
        "choose prompts or rewards that the policy sometimes fails and sometimes meets",
    )
    warn(
        "gap_mean",
        gap,
        f"sampler and trainer differ by {figures.get('gap_mean', 0):.1g} nats per token (at most "
        f'{figures.get("gap_max", 0):.1g}): ratios are biased; set config.model.dtype="float32"',
    )
    warn(
        "clipped",
        0.5,
        f"the clip acts on {figures.get('clipped', 0):.0%} of the tokens: lower config.optimizer.learning_rate or "
        "config.epochs",
    )
    warn(
        "kl_completion",
        20,
        f"the policy is {figures.get('kl_completion', 0):.0f} nats per completion from the reference: raise "
        "config.objective.kl_weight or beta, or lower config.optimizer.learning_rate",
    )
    if figures.get("explained_variance", 0) < 0:
        found.append(
            f"the value head explains less than nothing of the returns ({figures['explained_variance']:.2f}): raise "
            "config.objective.value_warmup or --prompts_per_round"
        )
    return found
