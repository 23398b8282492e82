"""Intervals hold the true value as often as they say, whatever the number of samples of a prompt."""

import numpy as np
import pytest
from scipy import stats

from kto_jax.evaluation.intervals import mean_interval, sign_test, statistic_interval
from tests.evaluation.simulated import coverage, draw_verdicts


def simulate(win_rate, num_prompts=100, num_samples=1, draws=1000, **how):
    def one(seed):
        shares, prompts = draw_verdicts(np.random.default_rng((seed, 1)), win_rate, num_prompts, num_samples, **how)
        return mean_interval(shares, prompts, draws=draws, seed=seed)

    return one


@pytest.mark.parametrize("win_rate", [0.3, 0.5])
def test_intervals_of_win_rates_cover(win_rate):
    assert 0.9 <= coverage(simulate(win_rate), win_rate, draws=80) <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("win_rate", [0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("how", [{}, {"num_samples": 4, "spread": 0.1}, {"num_prompts": 30}])
def test_intervals_cover_in_500_draws(win_rate, how):
    # Three standard errors of the share of 500 draws below 95 %, and what a discrete figure may be off by.
    assert coverage(simulate(win_rate, draws=10_000, **how), win_rate, draws=500) >= 0.92


def test_samples_of_one_prompt_count_as_one():
    rng = np.random.default_rng(0)
    own = rng.random(40)
    prompts = np.repeat(np.arange(40), 8)
    clustered, alone = mean_interval(own[prompts], prompts), mean_interval(own, range(40))
    assert clustered.value == pytest.approx(alone.value)
    assert clustered.low == pytest.approx(alone.low) and clustered.high == pytest.approx(alone.high)
    naive = mean_interval(own[prompts], range(320))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_prompts_with_more_values_count_more():
    assert mean_interval([1, 1, 1, 0], ["a", "a", "a", "b"]).value == 0.75


def test_how_many_values_a_prompt_has_adds_nothing_to_the_interval():
    counts = [1, 20] * 20
    values = [0.5 + 0.01 * (-1) ** prompt for prompt, count in enumerate(counts) for _ in range(count)]
    prompts = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
    found = mean_interval(values, prompts)
    assert 0.49 <= found.low <= found.value <= found.high <= 0.51


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_values_have_the_exact_interval_of_clopper_and_pearson(value):
    found = mean_interval(np.full(20, value), range(20))
    exact = stats.binomtest(20, 20).proportion_ci(method="exact").low
    assert found.value == value
    assert found.low == pytest.approx(value * exact)
    assert found.high == pytest.approx(1 - (1 - value) * exact)


def test_one_prompt_has_no_interval():
    found = mean_interval([1.0, 0.0], ["a", "a"])
    assert found.value == 0.5 and not found.is_known and not found.excludes(0.9)


def test_unequal_lengths_and_no_values_are_refused():
    with pytest.raises(ValueError, match="2 values were given with 1 prompts"):
        mean_interval([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="no values"):
        mean_interval([], [])


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(30)
    assert mean_interval(values, range(30), seed=3) == mean_interval(values, range(30), seed=3)


def test_the_interval_of_a_statistic_agrees_with_that_of_the_mean():
    values = np.random.default_rng(1).random(60)
    found = statistic_interval(lambda weights: np.average(values, weights=weights), range(60), draws=2000)
    mean = mean_interval(values, range(60))
    assert found.value == pytest.approx(mean.value)
    assert found.low == pytest.approx(mean.low, abs=0.01) and found.high == pytest.approx(mean.high, abs=0.01)


def test_the_interval_of_a_statistic_allows_for_skew():
    values = np.random.default_rng(1).exponential(size=20)
    found = statistic_interval(lambda weights: np.average(values, weights=weights), range(20), draws=4000)
    mean = mean_interval(values, range(20))
    assert found.low == pytest.approx(mean.low, abs=0.03) and found.high == pytest.approx(mean.high, abs=0.03)


def test_the_sign_test_is_exact_over_prompts():
    wins, losses = 9, 1
    shares = [1.0] * wins + [0.0] * losses + [0.5] * 5
    assert sign_test(shares, range(15)) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert sign_test(shares + [1.0] * 50, [*range(15), *([0] * 50)]) == pytest.approx(sign_test(shares, range(15)))
    assert sign_test([0.5, 0.5], "ab") == 1
