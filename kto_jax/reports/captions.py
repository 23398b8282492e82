"""Captions of the report's curves, for each objective."""

from __future__ import annotations

import dataclasses

from kto_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Captions:
    """The texts of a report that depend on the objective.

    Attributes:
      positive: name of the completions whose reward should rise: desirable or chosen.
      negative: name of the others.
      loss: caption of the loss curve.
      rewards: caption of the curves of rewards.
      ranking: caption of AUC and accuracy.
      kl: caption of the distance from the reference.
      saturated: caption of the share of saturated examples.
    """

    positive: str = "desirable"
    negative: str = "undesirable"
    loss: str = "Mean over the examples of each step."
    rewards: str = "Mean reward of each class. The shaded gap is the margin; what counts is that it opens."
    ranking: str = "AUC: the probability that a desirable completion has the higher reward. Chance level is 0.5."
    kl: str = ""
    saturated: str = ""


_LOSS_AT_START = {
    "kto": {
        "standard": 0.5,
        "zero": 0.5,
        "simple": 0.5,
        "log_sigmoid": 1.693,
        "identity": 1.0,
        "kahneman_tversky": 1.0,
    },
    "kto_log_utility": {"": 0.313},
    "apo_zero_unpaired": {"": 0.5},
    "bco": {"": 0.693},
    "dpo": {
        "sigmoid": 0.693,
        "robust": 0.693,
        "hinge": 1.0,
        "nca_pair": 1.386,
        "bco_pair": 1.386,
        "apo_zero": 1.0,
        "apo_down": 1.0,
    },
}
"""The loss when policy and reference agree, with weights of 1, by objective and variant."""

_LOSS = {
    "cpo": "CPO's loss: −log σ of the margin, plus the weighted mean negative log-probability of chosen completions.",
    "csft": "Mean negative log-probability of a completion token, in nats, after the control text of its label. "
    "Held-out: desirable completions after the good control text.",
    "ppo": "The clipped surrogate of the policy gradient and the weighted loss of the value head. Its level means "
    "little: look at the rewards of the rounds.",
    "grpo": "The surrogate of the policy gradient. Its level means little: look at the rewards of the rounds.",
    "orpo": "Mean negative log-probability of a token of the chosen completions, in nats, plus the weighted "
    "odds-ratio term.",
    "ppo_offline": "The clipped surrogate, the KL penalty and the weighted loss of the value head, averaged over "
    "tokens. It may be negative, and its level means little: look at the rewards.",
    "reward": "Bradley-Terry loss of each pair. A head that cannot rank has ln 2 = 0.693.",
    "sft": "Mean negative log-probability of a completion token, in nats.",
    "simpo": "−log σ of the margin in mean log-probability less the target margin.",
    "slic": "By how much the chosen completion fails to lead by the margin, in nats, plus the weighted mean negative "
    "log-probability of chosen completions.",
}

_REWARDS = {
    "cpo": "β times the log-probability of a completion, in nats.",
    "csft": "Mean log-probability of a completion token, in nats.",
    "grpo": "Log-ratio of the policy to the policy that sampled the completions, in nats.",
    "ppo": "Log-ratio of the policy to the policy that sampled the completions, in nats.",
    "orpo": "The odds weight times the mean log-probability of a completion token, in nats.",
    "reward": "What the reward head gives a completion.",
    "sft": "Mean log-probability of a completion token, in nats.",
    "simpo": "β times the mean log-probability of a completion token, in nats.",
    "slic": "Log-probability of a completion, in nats.",
}
"""Objectives whose rewards are not β times the log-ratio of policy to reference."""

_ACCURACY_OF_THUMBS = {
    "kto": "z0",
    "bco": "the running mean δ",
    "apo_zero_unpaired": "0",
    "ppo_offline": "0",
    "grpo": "0",
}
"""Thresholds: rewards of desirable completions should be above them, rewards of undesirable ones below."""


def captions_of(name: str, objective: Objective) -> Captions:
    """Returns the captions of a run.

    Args:
      name: the objective's name in `kto_jax.objectives.OBJECTIVES`. Any other name, such as a user's objective, gets
        generic captions.
      objective: the objective of the run.
    """
    variant = str(objective.options.get("variant", ""))
    positive, negative = ("chosen", "rejected") if objective.reads == "pairs" else ("desirable", "undesirable")
    return Captions(
        positive=positive,
        negative=negative,
        loss=_loss(name, variant, objective),
        rewards=_rewards(name, variant, objective),
        ranking=_ranking(name, objective, positive, negative),
        kl=_kl(objective),
        saturated="Share of examples so far from the reference point that their gradient is below a tenth of the "
        "largest.",
    )


def _loss(name: str, variant: str, objective: Objective) -> str:
    start = _LOSS_AT_START.get(name, {}).get(variant)
    if weight := objective.options.get("sft_weight"):
        return f"Mean over the examples of each step, {weight:g} times the SFT term of {name} included."
    if start:
        return (
            f"Where policy and reference agree, the loss is {start:g} (with weights of 1); it falls as the two classes "
            "separate."
        )
    return _LOSS.get(name, Captions.loss)


def _rewards(name: str, variant: str, objective: Objective) -> str:
    if variant == "reference_free":
        meaning = "β times the mean log-probability of a completion token, in nats."
    elif objective.uses_reference:
        meaning = "β times the log-ratio of policy to reference, in nats."
    else:
        meaning = _REWARDS.get(name, "Mean reward of each class.")
    if objective.reads == "desirable":
        return meaning
    return f"{meaning} The shaded gap is the margin; what counts is that it opens."


def _ranking(name: str, objective: Objective, positive: str, negative: str) -> str:
    auc = f"AUC: the probability that a random {positive} completion has a higher reward than a random {negative} one."
    if objective.reads == "pairs":
        accuracy = " Accuracy: the share of pairs whose chosen completion has the higher reward."
    elif objective.reads == "thumbs" and objective.uses_reference:
        point = _ACCURACY_OF_THUMBS.get(name, "the reference point")
        accuracy = f" Accuracy: the share of desirable completions above {point} and of undesirable ones below it."
    else:
        accuracy = ""
    return f"{auc}{accuracy} Chance level is 0.5."


def _kl(objective: Objective) -> str:
    if objective.first_pass == "matched":
        return "z0 is the mean log-ratio of the opposite class, averaged over the examples, in nats."
    if not objective.uses_reference:
        return (
            "z0 is the mean log-probability of a token of unrelated completions, in nats: the point from which gains "
            "and losses are counted."
        )
    return (
        "KL is estimated over unrelated pairs, in nats, ± its standard error in one step. z0 is the estimate clamped "
        "at 0: the point from which gains and losses are counted."
    )
