"""Judges of pairs: which of two completions of a prompt is better.

    feedback                             the classifier fitted on the run's share of feedback for judges
    vader                                sentiment
    max_words(12), is_json               a checker of `kto_jax.rewards.checkers`
    rewards.py:brevity                   a reward function, as `--reward` takes it
    judges.py:compare                    a function (prompts, a, b) -> 1 if a is better, 0 if b is, 0.5, or None
    judges.py:classifier                 an object with predict_proba, decision_function or predict, as scikit-learn's
    runs/reward                          a reward model
    http://127.0.0.1:8000/v1             a language model behind OpenAI's API, see `llm_judge`

Judges that score single completions are lifted: the completion with the higher score wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from kto_jax.config import ConfigError
from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.llm_judge import Endpoint, ask_in_both_orders
from kto_jax.evaluation.verdicts import Verdicts
from kto_jax.judges import judges
from kto_jax.rewards.functions import RewardFunction, Scored, import_object, open_rewards
from kto_jax.rewards.messages import as_completion


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a judge says of two models' completions.

    Attributes:
      judge: its name.
      verdicts: of every pair.
      scores: of the evaluated model's and of the baseline's completions, NaN where it gives none; None if the judge
        compares.
      note: what must be known to read its figures; may be empty.
    """

    judge: str
    verdicts: Verdicts
    scores: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]] | None = None
    note: str = ""


class PairJudge(Protocol):
    """A judge of pairs, from `open_judges`."""

    @property
    def name(self) -> str:
        """What the reports call it."""

    def judge(self, evaluated: Sequence[Answer], baseline: Sequence[Answer]) -> Judgement:
        """Judges completions of the same prompts, pair by pair.

        Raises:
          ConfigError: it cannot judge them.
          TransientError: it cannot be reached for now.
        """


@dataclasses.dataclass(frozen=True)
class ScoreJudge:
    """A judge that scores single completions.

    Attributes:
      name: what the reports call it.
      score: completions -> a score each, None where it does not apply.
      tie: scores that differ by at most this much are a tie.
      note: see `Judgement`.
    """

    name: str
    score: Callable[[Sequence[Answer]], Sequence[float | None]]
    tie: float = 0.0
    note: str = ""

    def judge(self, evaluated: Sequence[Answer], baseline: Sequence[Answer]) -> Judgement:
        """See `PairJudge`."""
        ours, theirs = (
            np.asarray([math.nan if score is None else score for score in self.score(side)], float)
            for side in (evaluated, baseline)
        )
        lead = ours - theirs
        with np.errstate(invalid="ignore"):
            shares = np.where(np.abs(lead) <= self.tie, 0.5, (lead > 0).astype(float))
        shares[np.isnan(lead)] = math.nan
        return Judgement(self.name, Verdicts([one.key for one in evaluated], shares), (ours, theirs), self.note)


@dataclasses.dataclass(frozen=True)
class FunctionJudge:
    """A user's function (prompts, a, b) -> one verdict for each pair; it is asked in both orders."""

    name: str
    compare: Callable[..., Sequence[float | None]]

    def judge(self, evaluated: Sequence[Answer], baseline: Sequence[Answer]) -> Judgement:
        """See `PairJudge`."""
        first = self._ask(evaluated, baseline)
        second = 1 - self._ask(baseline, evaluated)
        return Judgement(self.name, Verdicts([one.key for one in evaluated], first, second))

    def _ask(self, a: Sequence[Answer], b: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        prompts = [one.prompt for one in a]
        try:
            found = list(self.compare(prompts=prompts, a=[one.text for one in a], b=[one.text for one in b]))
        except Exception as error:
            raise ConfigError(
                f"the judge {self.name} raised {type(error).__name__}: {error}. A judge takes prompts, a and b and "
                "returns one verdict for each pair. Correct the function, or take it out of --judge."
            ) from error
        if len(found) != len(a):
            raise self._refusal(f"returned {len(found)} verdicts for {len(a)} pairs")
        for verdict in found:
            if verdict is not None and not (isinstance(verdict, int | float | np.number) and 0 <= verdict <= 1):
                raise self._refusal(f"returned {verdict!r}")
        return np.asarray([math.nan if verdict is None else float(verdict) for verdict in found])

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f"the judge {self.name} {what}. It must return a number from 0 (b is better) to 1 (a is better), or None, "
            "for each pair. Correct the function, or take it out of --judge."
        )


@dataclasses.dataclass(frozen=True)
class ModelJudge:
    """A language model behind an endpoint; it is asked in both orders."""

    name: str
    endpoint: Endpoint

    def judge(self, evaluated: Sequence[Answer], baseline: Sequence[Answer]) -> Judgement:
        """See `PairJudge`."""
        first, second = ask_in_both_orders(self.endpoint, evaluated, baseline)
        return Judgement(self.name, Verdicts([one.key for one in evaluated], first, second))


@contextlib.contextmanager
def open_judges(
    names: Sequence[str],
    *,
    tie: float = 0.0,
    dtype: str = "float32",
    timeout: float = 600.0,
    feedback: Callable[[], judges.FeedbackJudge] | None = None,
    endpoint: Endpoint | None = None,
) -> Iterator[list[PairJudge]]:
    """Opens judges by the names that the top of this file lists.

    Args:
      names: none twice.
      tie: for judges that score: largest difference of a tie.
      dtype: what reward models compute in.
      timeout: seconds that a reward function may take.
      feedback: fits the feedback judge; None if there is no run.
      endpoint: settings of language models; their URL is the judge's name.

    Yields:
      The judges, in order.

    Raises:
      ConfigError: a name is unknown, or what it names cannot be used.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"--judge names a judge twice: {', '.join(names)}. Allowed: each judge once. Take one out.")
    with contextlib.ExitStack() as stack:
        yield [_open(name, stack, tie, dtype, timeout, feedback, endpoint) for name in names]


def _open(
    name: str,
    stack: contextlib.ExitStack,
    tie: float,
    dtype: str,
    timeout: float,
    feedback: Callable[[], judges.FeedbackJudge] | None,
    endpoint: Endpoint | None,
) -> PairJudge:
    if name.startswith(("http://", "https://")):
        endpoint = dataclasses.replace(endpoint or Endpoint(), url=name)
        return ModelJudge(f"{endpoint.model or 'model'} at {name}", endpoint)
    if name == "feedback":
        return _feedback_judge(feedback, tie)
    if name == "vader":
        vader = judges.fit_vader_judge()
        return ScoreJudge(name, lambda answers: vader.compounds([one.text for one in answers]).tolist(), tie)
    if _is_import(name):
        found = import_object(name, "--judge")
        if any(hasattr(found, method) for method in _METHODS):
            return ScoreJudge(name, _scores_of(name, found), tie)
        if callable(found) and {"a", "b"} <= set(inspect.signature(found).parameters):
            return FunctionJudge(name, found)
    try:
        (function,) = stack.enter_context(open_rewards([name], dtype=dtype))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--reward", "--judge")) from error
    return ScoreJudge(name, lambda answers: _rewards(function, answers, timeout), tie)


def _is_import(name: str) -> bool:
    return name.rpartition(":")[2].isidentifier() and ":" in name


def _feedback_judge(feedback: Callable[[], judges.FeedbackJudge] | None, tie: float) -> ScoreJudge:
    if feedback is None:
        raise ConfigError(
            "--judge=feedback is fitted on the feedback of a run, and --run is not given. Allowed with --run. Set "
            "--run, or another judge."
        )
    fitted = feedback()
    accuracy, auc = fitted.quality["accuracy"], fitted.quality["auc"]
    note = (
        f"fitted on {fitted.quality['examples']:.0f} labelled completions that no policy was trained on; on unseen "
        f"prompts it agrees with {100 * accuracy:.0f} % of the labels (AUC {auc:.2f})"
    )
    return ScoreJudge(
        "feedback", lambda answers: fitted.probabilities([one.text for one in answers]).tolist(), tie, note
    )


def _rewards(function: RewardFunction, answers: Sequence[Answer], timeout: float) -> list[float | None]:
    names = dict.fromkeys(name for one in answers for name in one.columns)
    scored = Scored(
        prompts=[one.prompt for one in answers],
        completions=[as_completion(one.prompt, one.text) for one in answers],
        completion_ids=[one.ids for one in answers],
        ended=[one.ended for one in answers],
        columns={name: [one.columns.get(name) for one in answers] for name in names},
        places=[one.place for one in answers],
    )
    return function(scored, timeout)


_METHODS = ("predict_proba", "decision_function", "predict")
"""What an object scores texts with, the first that it has."""


def _scores_of(name: str, model: Any) -> Callable[[Sequence[Answer]], list[float]]:
    """Scores by the first of `_METHODS`: the probability of the last class, the decision value, or the prediction."""

    def score(answers: Sequence[Answer]) -> list[float]:
        texts = [one.text for one in answers]
        method = next(method for method in _METHODS if hasattr(model, method))
        try:
            found = np.asarray(getattr(model, method)(texts), float)
        except Exception as error:
            raise ConfigError(
                f"the judge {name} raised {type(error).__name__} in {method}: {error}. It is given a list of texts. "
                "Correct it, or take it out of --judge."
            ) from error
        found = found[:, -1] if found.ndim == 2 else found
        if found.shape != (len(texts),) or not np.isfinite(found).all():
            raise ConfigError(
                f"the judge {name} returned an array of shape {found.shape} for {len(texts)} texts, or values that are "
                "not finite. Allowed: one finite number for each text, or a row of class probabilities. Correct it."
            )
        return found.tolist()

    return score
