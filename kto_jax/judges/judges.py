"""Judges: independent scores of completions, before and after training.

A judge never sees a prompt that was trained on: the feedback judge is fitted on its own share of the prompts, and VADER
is a lexicon of 2014. Neither measures quality. They show in which direction the text moved, not how good it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kto_jax.config import ConfigError, nearest
from kto_jax.config.packages import require


class Judge(Protocol):
    """Scores completions; made by `fit_judge`."""

    @property
    def quality(self) -> Mapping[str, float]:
        """How accurate the judge itself is, on feedback that it was not fitted on."""

    def each(self, completions: Sequence[str]) -> dict[str, np.ndarray]:
        """Figures of each completion.

        Args:
          completions: decoded text.

        Returns:
          Figure name -> one value for each completion; the same names in the same order on every call.
        """

    def score(self, completions: Sequence[str]) -> dict[str, float]:
        """The means of the figures of a set of completions.

        Args:
          completions: decoded text; at least one.

        Returns:
          Figure name -> value, as `each` names them.

        Raises:
          ValueError: `completions` is empty.
        """


@dataclasses.dataclass(frozen=True)
class FeedbackJudge:
    """TF-IDF and logistic regression, fitted on labelled completions of prompts that are never trained on."""

    pipeline: Any
    quality: Mapping[str, float]

    def probabilities(self, completions: Sequence[str]) -> np.ndarray:
        """The probability that each completion is desirable, float64 [len(completions)]."""
        return self.pipeline.predict_proba(list(completions))[:, 1]

    def each(self, completions: Sequence[str]) -> dict[str, np.ndarray]:
        """`judged desirable (share)`: whether the probability is above a half; `desirable probability`."""
        probabilities = self.probabilities(completions)
        return {"judged desirable (share)": (probabilities > 0.5) * 1.0, "desirable probability": probabilities}

    def score(self, completions: Sequence[str]) -> dict[str, float]:
        """The means of `each`."""
        _require_some(completions)
        return _means(self.each(completions))


@dataclasses.dataclass(frozen=True)
class VaderJudge:
    """VADER, a lexicon of sentiment (Hutto and Gilbert, 2014): it knows nothing of the feedback."""

    analyzer: Any
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def compounds(self, completions: Sequence[str]) -> np.ndarray:
        """The compound score of each completion in [-1, 1], float64 [len(completions)]."""
        return np.asarray([self.analyzer.polarity_scores(text)["compound"] for text in completions], float)

    def each(self, completions: Sequence[str]) -> dict[str, np.ndarray]:
        """`positive (share)`: whether the compound score is above 0; `compound`: that score, in [-1, 1]."""
        compounds = self.compounds(completions)
        return {"positive (share)": (compounds > 0) * 1.0, "compound": compounds}

    def score(self, completions: Sequence[str]) -> dict[str, float]:
        """The means of `each`."""
        _require_some(completions)
        return _means(self.each(completions))


def fit_feedback_judge(
    completions: Sequence[str], desirable: Sequence[bool], prompts: Sequence[Hashable], *, num_folds: int = 5
) -> FeedbackJudge:
    """Fits the feedback judge, and measures it by cross-validation grouped by prompt.

    Args:
      completions: labelled text.
      desirable: thumbs-up or thumbs-down of each.
      prompts: what each was written for; any hashable. No prompt is on both sides of a fold.
      num_folds: folds of the cross-validation; fewer if there are fewer prompts.

    Returns:
      The judge. Its `quality` has `accuracy` and `auc` on held-out prompts (NaN with fewer than two usable prompts)
      and `examples`, how many it was fitted on.

    Raises:
      ConfigError: only one of the two labels occurs, or no completion contains a word.
    """
    labels = np.asarray(desirable, dtype=bool)
    if len(labels) == 0 or labels.all() or not labels.any():
        raise ConfigError(
            f"the feedback judge was given {int(labels.sum())} desirable and {int((~labels).sum())} undesirable "
            'completions; it needs both. Raise config.data.judge_holdout, or take "feedback" out of '
            "config.samples.judges."
        )
    texts = np.asarray(completions, dtype=object)
    try:
        pipeline = _new_pipeline().fit(texts, labels)
    except ValueError as error:
        if "vocabulary" not in str(error):
            raise
        raise ConfigError(
            f"none of the {len(texts)} completions given to the feedback judge contains a word of two letters or more. "
            'It judges words. Take "feedback" out of config.samples.judges.'
        ) from error
    quality = _cross_validate(texts, labels, prompts, num_folds) | {"examples": float(len(labels))}
    return FeedbackJudge(pipeline, quality)


def fit_vader_judge(
    completions: Sequence[str] = (), desirable: Sequence[bool] = (), prompts: Sequence[Hashable] = ()
) -> VaderJudge:
    """Makes the VADER judge. It needs no feedback: the arguments are those of every judge."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return VaderJudge(SentimentIntensityAnalyzer())


JUDGES: dict[str, Callable[[Sequence[str], Sequence[bool], Sequence[Hashable]], Judge]] = {
    "feedback": fit_feedback_judge,
    "vader": fit_vader_judge,
}


_PACKAGES = {"feedback": "sklearn", "vader": "vaderSentiment"}


def fit_judge(name: str, completions: Sequence[str], desirable: Sequence[bool], prompts: Sequence[Hashable]) -> Judge:
    """Makes the judge called `name` from the judge's share of the feedback.

    Raises:
      ConfigError: there is no judge of that name, or it cannot be fitted on the feedback.
    """
    check_names([name])
    return JUDGES[name](completions, desirable, prompts)


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError unless every name is a judge's whose package is installed; touches no device."""
    for name in names:
        if name not in JUDGES:
            raise ConfigError(
                f"config.samples.judges names {name!r}, which is not a judge. {nearest(name, JUDGES)} Use one of "
                "these, or leave the list empty."
            )
        require(_PACKAGES[name], f"the judge {name!r} of config.samples.judges", f"take {name!r} out of the list")


def compare(name: str, judge: Judge, before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    """The judge's verdicts on completions of the same prompts before and after training, as the report shows them.

    Returns:
      One `{"judge", "figure", "before", "after"}` per figure.
    """
    figures_before, figures_after = judge.score(before), judge.score(after)
    return [
        {"judge": name, "figure": figure, "before": value, "after": figures_after[figure]}
        for figure, value in figures_before.items()
    ]


def _means(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in figures.items()}


def _require_some(completions: Sequence[str]) -> None:
    if len(completions) == 0:
        raise ValueError("there are no completions to judge; give at least one.")


def _new_pipeline() -> Any:
    # Imported here because scikit-learn takes a second to import, and most runs have no judge.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # Balanced, so that a judge fitted on imbalanced feedback does not predict the more frequent label everywhere.
    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )


def _cross_validate(
    texts: np.ndarray, labels: np.ndarray, prompts: Sequence[Hashable], num_folds: int
) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    number: dict[Hashable, int] = {}
    groups = np.asarray([number.setdefault(prompt, len(number)) for prompt in prompts])
    num_folds = min(num_folds, len(number))
    probabilities = np.full(len(labels), math.nan)
    if num_folds >= 2:
        for fit_rows, held_rows in GroupKFold(num_folds).split(texts, labels, groups):
            if labels[fit_rows].all() or not labels[fit_rows].any():
                continue
            fold = _new_pipeline().fit(texts[fit_rows], labels[fit_rows])
            probabilities[held_rows] = fold.predict_proba(texts[held_rows])[:, 1]
    judged = ~np.isnan(probabilities)
    if not judged.any():
        return {"accuracy": math.nan, "auc": math.nan}
    held_labels, held = labels[judged], probabilities[judged]
    both = held_labels.any() and not held_labels.all()
    return {
        "accuracy": float(np.mean((held > 0.5) == held_labels)),
        "auc": float(roc_auc_score(held_labels, held)) if both else math.nan,
    }
