"""One sentence that says what training changed, by how much, and whether to trust it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kto_jax.reports.charts import is_number, series

_FEW = 20
_WEAK = 0.6
"""A judge that agrees with fewer of the labels is hardly better than a coin."""


def headline(
    rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], held_out: tuple[int, int]
) -> str:
    """The sentence at the top of a report.

    Args:
      rows: metrics of each step, in order.
      verdicts: of the judges; the first with a before and an after is told.
      held_out: desirable and undesirable completions of an evaluation; for pairs, their number twice.
    """
    told = [verdict for verdict in verdicts if is_number(verdict.get("before")) and is_number(verdict.get("after"))]
    judged = [verdict for verdict in told if verdict["judge"] != "reference"]
    if judged:
        perplexity = next((verdict for verdict in told if verdict["judge"] == "reference"), None)
        return _of_judge(judged[0], perplexity)
    return _of_metrics(rows, held_out)


def _of_judge(verdict: Mapping[str, Any], perplexity: Mapping[str, Any] | None) -> str:
    before, after = verdict["before"], verdict["after"]
    share = "share" in verdict["figure"]
    name = verdict["figure"].replace(" (share)", "").replace("share of ", "")
    change = after - before
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed"
    show = (lambda value: f"{100 * value:.0f} %") if share else (lambda value: f"{value:.3g}")
    what = f"the share of completions {name}" if share else f"the mean {name}"
    text = f"On {verdict['prompts']} held-out prompts, " if "prompts" in verdict else "On held-out prompts, "
    text += f"{what} by the judge {verdict['judge']} {verb} from {show(before)} to {show(after)}"
    low, high = verdict.get("low"), verdict.get("high")
    if is_number(low) and is_number(high):
        ends = sorted((abs(low), abs(high))) if low * high > 0 else (low, high)
        scale, unit = (100, " points") if share else (1, "")
        size = f"{abs(change) * scale:.0f}" if share else f"{abs(change):.3g}"
        shown = " to ".join(f"{scale * end:.0f}" if share else f"{end:.3g}" for end in ends)
        text += f", by {size}{unit} (95 % interval {shown})"
    text += f". {_trust(verdict, low, high)}"
    if perplexity is not None:
        old, new = perplexity["before"], perplexity["after"]
        text += f" The base model's perplexity of the texts went from {old:.3g} to {new:.3g}."
    return text


def _trust(verdict: Mapping[str, Any], low: Any, high: Any) -> str:
    if not (is_number(low) and is_number(high)):
        return "There is no interval, so do not rely on it."
    reasons = []
    if verdict.get("prompts", _FEW) < _FEW:
        reasons.append(f"{verdict['prompts']} prompts are few")
    accuracy = verdict.get("accuracy")
    if is_number(accuracy) and accuracy < _WEAK:
        reasons.append(f"the judge agrees with only {100 * accuracy:.0f} % of held-out labels")
    if low <= 0 <= high:
        return "That may be chance" + (f", and {' and '.join(reasons)}." if reasons else ".")
    if reasons:
        return f"Do not rely on it yet: {' and '.join(reasons)}."
    agrees = f", and the judge agrees with {100 * accuracy:.0f} % of held-out labels" if is_number(accuracy) else ""
    return f"It is not chance{agrees}."


def _of_metrics(rows: Sequence[Mapping[str, Any]], held_out: tuple[int, int]) -> str:
    steps, found = series(rows, "eval_auc")
    losses = series(rows, "eval_loss")
    if len(steps):
        auc = float(found[0, -1])
        text = f"After {steps[-1]:.0f} steps, held-out AUC is {auc:.2f}"
        if error := _auc_error(auc, *held_out):
            low, high = max(0.0, auc - 1.96 * error), min(1.0, auc + 1.96 * error)
            verdict = "it may be chance, which is 0.5" if low <= 0.5 <= high else "chance would be 0.5"
            return f"{text} (95 % interval {low:.2f} to {high:.2f}): {verdict}. No judge read the policy's own text."
        return f"{text}; chance is 0.5. No judge read the policy's own text."
    if len(losses[0]) > 1:
        first, last = losses[1][0, 0], losses[1][0, -1]
        return f"Held-out loss went from {first:.3g} to {last:.3g}. No judge read the policy's own text."
    steps, found = series(rows, "loss")
    if not len(steps):
        return "No step was taken."
    return (
        f"Training loss went from {found[0, 0]:.3g} to {found[0, -1]:.3g} over {len(steps)} steps. Nothing was held "
        "out, so nothing is known of its effect: set data.holdout, or run kto_jax.evaluate."
    )


def _auc_error(auc: float, desirable: int, undesirable: int) -> float:
    """The standard error of an AUC by Hanley and McNeil (1982); 0 if it is unknown."""
    if desirable < 2 or undesirable < 2 or not 0 <= auc <= 1:
        return 0.0
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (desirable - 1) * (one - auc**2) + (undesirable - 1) * (two - auc**2)
    return math.sqrt(max(variance, 0.0) / (desirable * undesirable))
