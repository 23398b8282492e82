"""Win rates count ties, failures and the judge's preference for a position."""

import math

import numpy as np
import pytest

from kto_jax.evaluation.verdicts import Verdicts, win_rate


def judge_pairs(rng, quality, bias, num_prompts=200):
    """Verdicts of a judge that picks the first position with probability `bias` and judges otherwise."""
    better = rng.random(num_prompts) < quality
    first = np.where(rng.random(num_prompts) < bias, True, better)
    second = np.where(rng.random(num_prompts) < bias, False, better)
    return Verdicts(range(num_prompts), first.astype(float), second.astype(float))


def test_pairs_are_counted_and_ties_are_half_a_win():
    found = win_rate(Verdicts("abcde", np.array([1, 1, 0.5, 0, math.nan])))
    assert (found.wins, found.ties, found.losses, found.failures, found.pairs, found.prompts) == (2, 1, 1, 1, 4, 4)
    assert found.rate.value == 2.5 / 4
    assert found.positions is None


def test_a_verdict_needs_both_orders_and_contradictions_are_ties():
    verdicts = Verdicts("abcd", np.array([1, 1, math.nan, 0.5]), np.array([1, 0, 1, 1]))
    found = win_rate(verdicts)
    assert (found.wins, found.ties, found.losses, found.failures) == (2, 1, 0, 1)
    assert found.positions.contradictions == pytest.approx(1 / 3)


def test_no_readable_verdict_gives_no_win_rate():
    found = win_rate(Verdicts("ab", np.full(2, math.nan)))
    assert math.isnan(found.rate.value) and found.failures == 2 and found.pairs == 0 and not found.rate.is_known


@pytest.mark.parametrize("bias", [0.15, 0.4])
def test_an_injected_position_bias_is_found_and_does_not_move_the_win_rate(bias):
    found = win_rate(judge_pairs(np.random.default_rng(0), quality=0.5, bias=bias))
    assert found.positions.is_biased
    assert found.positions.first_wins.value == pytest.approx(0.5 + bias / 2, abs=0.04)
    assert found.positions.contradictions == pytest.approx(bias, abs=0.15)
    assert found.rate.low <= 0.5 <= found.rate.high


def test_a_judge_without_bias_is_seldom_called_biased():
    def is_called_biased(seed):
        return win_rate(
            judge_pairs(np.random.default_rng(seed), quality=0.6, bias=0.0, num_prompts=80)
        ).positions.is_biased

    assert sum(map(is_called_biased, range(20))) <= 2
