"""Figures and warnings of a round."""

import math

import numpy as np
import pytest

from kto_jax.rollouts.figures import explained_variance, figures_of, token_figures, warnings_of


def row(prompt, reward, num_tokens, ended=True):
    return {"prompt_id": prompt, "reward": reward, "num_tokens": num_tokens, "ended": ended, "rewards": {"r": reward}}


def test_figures_of_rewards_and_lengths():
    rows = [row("a", 0.0, 2), row("a", 1.0, 9), row("b", 1.0, 5, ended=False), row("b", 1.0, 7), row("c", None, 3)]
    found = figures_of(rows)
    assert (found["completions"], found["reward"], found["reward/r"]) == (5, 0.75, 0.75)
    assert (found["cut"], found["no_spread"]) == (0.2, 0.5)
    assert (found["num_tokens"], found["num_tokens_above"], found["num_tokens_below"]) == (5.2, 7, 2)
    assert found["reward_error"] == pytest.approx(0.25)  # over the prompts' means, 0.5 and 1


def test_figures_of_tokens():
    figures = {
        "old_logps": [np.array([-1.0, -2.0]), np.array([-3.0])],
        "sampled_logps": [np.array([-1.0, -2.25]), np.array([-3.5])],
        "reference_logps": [np.array([-1.5, -2.0]), np.array([-2.0])],
    }
    found = token_figures(figures, temperature=1.0)
    assert (found["gap_mean"], found["gap_max"], found["entropy"]) == (0.25, 0.5, 2)
    d = np.array([0.5, 0.0, -1.0])
    assert found["kl_k1"] == pytest.approx(d.mean()) and found["kl_completion"] == pytest.approx(d.sum() / 2)
    assert found["kl_k3"] == pytest.approx(np.mean(np.exp(-d) - 1 + d), rel=1e-6)
    del figures["reference_logps"]
    assert token_figures(figures, temperature=0.7).keys() == {"gap_mean", "gap_max"}
    weighted = token_figures(figures, temperature=0.7, weight_cap=1.5)
    assert weighted["weight"] == pytest.approx((1 + np.exp(0.25) + 1.5) / 3)
    assert weighted["weights_cut"] == pytest.approx(1 / 3)  # exp(0.5) is 1.65


def test_explained_variance():
    rows = [{"returns": [0.0, 2.0], "values": [0.0, 1.0]}, {"returns": [4.0], "values": [4.0]}]
    assert explained_variance(rows) == pytest.approx(1 - np.var([0, 1, 0]) / np.var([0, 2, 4]))
    assert math.isnan(explained_variance([{"returns": [1.0], "values": [0.0]}]))


FINE = {"cut": 0.1, "no_spread": 0.5, "gap_mean": 1e-5, "gap_max": 1e-4, "clipped": 0.1, "kl_completion": 1.0}


@pytest.mark.parametrize("change, expected", [
    ({"cut": 0.96}, "96% of the completions were cut at 64 tokens: raise --max_new_tokens"),
    ({"cut": 1.0}, "no completion ended within 64 tokens: .* check config.data.chat_template"),
    ({"no_spread": 0.95}, "for 95% of the prompts all completions have the same reward: raise --num_samples"),
    ({"gap_mean": 2e-3}, 'sampler and trainer differ by 0.002 nats .* set config.model.dtype="float32"'),
    ({"clipped": 0.6}, "the clip acts on 60% of the tokens: lower config.optimizer.learning_rate or config.epochs"),
    ({"kl_completion": 31.0}, "the policy is 31 nats per completion from the reference: raise config.objective.kl_w"),
    ({"explained_variance": -0.5}, "explains less than nothing of the returns .-0.50.: raise config.objective.value_w"),
])  # fmt: skip
def test_a_warning_says_what_to_do(change, expected):
    (warning,) = warnings_of(FINE | change, max_new_tokens=64, dtype="float32")
    assert __import__("re").search(expected, warning), warning
    assert warnings_of(FINE, max_new_tokens=64, dtype="float32") == []
    assert warnings_of(FINE | {"gap_mean": 2e-3}, max_new_tokens=64, dtype="bfloat16") == []
