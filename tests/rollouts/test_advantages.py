"""Advantages of sampled tokens, against numbers worked out by hand."""

import numpy as np
import pytest

from kto_jax.config import DataConfig
from kto_jax.data.rows.records import records_of
from kto_jax.objectives.record import Advantages
from kto_jax.rollouts.advantages import advantages, as_numbers, has_spread

LENGTHS = (3, 1, 2, 2)


def rows(*rewards, prompt="Q?", ended=True):
    return [
        {"prompt": prompt, "completion": f"{prompt} {i}", "reward": reward, "ended": ended, "prompt_id": prompt,
         "sample": i, "round": 3, "prompt_ids": [1, 2], "completion_ids": [7] * LENGTHS[i]}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip


def figures(rollout, *, gap=0.0, value=0.0):
    """Old log-probabilities of −1, a reference `gap` nats below, and equal values."""
    ones = [np.ones(len(row["completion_ids"]), np.float32) for row in rollout]
    return {
        "old_logps": [-one for one in ones],
        "reference_logps": [-(1 + gap) * one for one in ones],
        "values": [value * one for one in ones],
    }


def found(rollout, rule, *, keep_cut=True, **settings):
    return advantages(rollout, figures(rollout, **settings), rule, keep_cut=keep_cut)


def by_completion(labelled):
    assert all(len(set(row["advantages"])) == 1 for row in labelled.rows)
    return [round(row["advantages"][0], 3) for row in labelled.rows]


@pytest.mark.parametrize("rule, expected", [
    (Advantages("group"), [-1, 0, 1, 0]),
    (Advantages("group", "group"), [-1.414, 0, 1.414, 0]),
    (Advantages("leave_one_out"), [-1.333, 0, 1.333, 0]),
    # The KL to the reference, 0.5 nats a token, costs 0.2 · 0.5 of each reward for each token.
    (Advantages("group", kl_weight=0.2), [-1.1, 0.1, 1, 0]),
    (Advantages("group", kl_weight=0.2, kl_estimator="k2"), [-1.025, 0.025, 1, 0]),
])  # fmt: skip
def test_each_token_has_the_advantage_of_its_completion(rule, expected):
    labelled = found(rows(0, 1, 2, 1), rule, gap=0.5)
    np.testing.assert_allclose(by_completion(labelled), expected, atol=1e-3)
    assert [len(row["advantages"]) for row in labelled.rows] == list(LENGTHS)
    assert rule.kl_weight or labelled.desirable == sum(value > 0 for value in expected)


def test_the_spread_of_the_round_may_divide_advantages():
    rollout = rows(0, 2) + rows(5, 5, prompt="R?")
    deviation = np.std([0, 2, 5, 5])
    np.testing.assert_allclose(
        by_completion(found(rollout, Advantages("group", "batch"))), [-1 / deviation, 1 / deviation, 0, 0], atol=1e-3
    )


@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_0(kind, scale):
    labelled = found(rows(0.1, 0.1, 0.1), Advantages(kind, scale))
    assert [row["advantages"] for row in labelled.rows] == [[0.0] * 3, [0.0], [0.0] * 2]


def test_what_teaches_nothing_is_dropped_and_counted():
    rollout = rows(0, 1, 2, None) + rows(5, 5, prompt="R?") + rows(3, prompt="S?")
    rollout[2]["ended"] = False  # counts in its prompt's mean
    labelled = found(rollout, Advantages("group"), keep_cut=False)
    assert by_completion(labelled) == [-1, 0, 0, 0]
    assert labelled.dropped == {
        "no reward applies": 1, "cut before its end": 1, "of a prompt without different rewards": 1,
    }  # fmt: skip
    dropping = found(rollout, Advantages("group", drop_equal=True))
    assert by_completion(dropping) == [-1, 0, 1]
    assert dropping.dropped == {"no reward applies": 1, "of a prompt without different rewards": 3}


def test_a_named_reward_may_decide_what_has_a_spread():
    rollout = [{**row, "rewards": {"right": 1.0, "short": i}} for i, row in enumerate(rows(1, 2))]
    rule = Advantages("group", drop_equal=True)
    assert len(found(rollout, rule).rows) == 2
    labelled = advantages(rollout, figures(rollout), rule, keep_cut=True, spread_of="right")
    assert labelled.rows == [] and has_spread(rollout) and has_spread(rollout, "short")


def test_generalised_advantages_are_those_of_a_reward_on_the_last_token():
    rollout = rows(1, -1)
    rule = Advantages("gae", discount=0.5, trace=0.5, kl_weight=0.1)
    first, second = found(rollout, rule, gap=1.0, value=0.2).rows
    # Rewards −0.1, −0.1, 0.9; δ = r + ½ V − V, with V = 0 after the end.
    last = 0.9 - 0.2
    middle = -0.1 + 0.1 - 0.2 + 0.25 * last
    start = -0.1 + 0.1 - 0.2 + 0.25 * middle
    np.testing.assert_allclose(first["advantages"], [start, middle, last], rtol=1e-6)
    np.testing.assert_allclose(first["returns"], [start + 0.2, middle + 0.2, last + 0.2], rtol=1e-6)
    np.testing.assert_allclose(second["advantages"], [-1.1 - 0.2], rtol=1e-6)


def test_generalised_advantages_are_whitened_over_the_tokens_of_the_round():
    labelled = found(rows(1, -1, 3), Advantages("gae", "batch", trace=1.0))
    tokens = np.concatenate([row["advantages"] for row in labelled.rows])
    np.testing.assert_allclose(tokens, (np.array([1, 1, 1, -1, 3, 3]) - 8 / 6) / np.std([1, 1, 1, -1, 3, 3]), rtol=1e-5)
    assert labelled.rows[0]["returns"] == [1.0] * 3, "only advantages are whitened"


def test_a_prompt_of_one_completion_is_enough_for_a_value_head():
    assert len(found(rows(1), Advantages("gae")).rows) == 1


def test_tokens_of_another_policy_weigh_as_their_probabilities_differ_up_to_the_cap():
    rollout, rule = rows(0, 2), Advantages("group")
    given = figures(rollout)
    given["sampled_logps"] = [np.array([-1.0, -0.5, -3.0], np.float32), np.array([-1.5], np.float32)]
    first, second = (row["advantages"] for row in advantages(rollout, given, rule, keep_cut=True, weight_cap=2.0).rows)
    np.testing.assert_allclose(first, [-1, -np.exp(-0.5), -2], rtol=1e-6)  # exp(2) is cut
    np.testing.assert_allclose(second, [np.exp(0.5)], rtol=1e-6)


def test_the_rows_are_read_back_with_every_float32():
    rollout = rows(0, 1)
    given = figures(rollout)
    given["old_logps"][0] = np.array([-0.1, -1 / 3, -7.123456e-5], np.float32)
    labelled = advantages(rollout, given, Advantages("group"), keep_cut=True)
    data = DataConfig(format="scores", layout="halos", sampled_tokens=True)
    read = list(records_of(iter([(f"a:{i}", row) for i, row in enumerate(labelled.rows)]), data))
    assert [one.score for one in read] == [-0.5, 0.5]
    np.testing.assert_array_equal(read[0].sampled.figures[:, 0], given["old_logps"][0])
    np.testing.assert_array_equal(read[0].sampled.figures[:, 2], [-0.5] * 3)
    assert as_numbers(np.float32([0.1])) == [0.1]
