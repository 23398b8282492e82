"""A planted effect of length is recovered, and the win rate without it."""

import numpy as np
import pytest

from kto_jax.evaluation.length_control import length_controlled
from tests.evaluation.simulated import coverage


def planted(seed, theta, phi, num_prompts=1500, longer=40.0):
    """Verdicts of a judge that likes length: logit P(win) = θ + φ tanh(Δ / std)."""
    rng = np.random.default_rng(seed)
    extra = longer + 100 * rng.standard_normal(num_prompts)
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(extra / extra.std()))))
    return (rng.random(num_prompts) < chance).astype(float), extra, range(num_prompts)


@pytest.mark.parametrize(("theta", "phi"), [
    (-0.4, 1.5), *(pytest.param(*each, marks=pytest.mark.nightly) for each in ((0.0, 2.0), (0.5, 0.0))),
])  # fmt: skip
def test_a_planted_length_effect_is_recovered(theta, phi):
    shares, extra, prompts = planted(0, theta, phi)
    found = length_controlled(shares, extra, prompts, draws=40)
    true = 1 / (1 + np.exp(-theta))
    assert found.effect == pytest.approx(phi, abs=0.25)
    assert found.rate.value == pytest.approx(true, abs=0.03)
    if phi > 1:
        assert shares.mean() > found.rate.value + 0.05  # what length alone won


def test_ties_are_half_a_win():
    shares, extra = np.full(200, 0.5), np.linspace(-50, 50, 200)
    shares[:20], shares[-20:] = 0, 1
    found = length_controlled(shares, extra, range(200), draws=20)
    assert found.rate.value == pytest.approx(0.5, abs=0.01) and found.effect > 0.3


@pytest.mark.parametrize(
    ("shares", "extra", "reason"),
    [([1, 0], [5, 5], "same length"), ([1, 1], [5, 6], "same verdict"), ([], [], "no verdict")],
)
def test_it_says_why_there_is_no_rate(shares, extra, reason):
    found = length_controlled(np.array(shares, float), np.array(extra, float), range(len(shares)))
    assert reason in found.undefined and not found.rate.is_known


def test_a_perfect_fit_is_finite():
    found = length_controlled(np.array([1.0, 1, 1, 0, 0, 0]), np.array([9.0, 8, 7, -7, -8, -9]), range(6), draws=30)
    assert 0.2 < found.rate.value < 0.8 and np.isfinite(found.effect)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rate", [0.3, 0.4, 0.5, 0.6, 0.7])
def test_intervals_at_equal_lengths_cover_in_500_draws(rate):
    def interval(seed):
        shares, extra, prompts = planted(seed, np.log(rate / (1 - rate)), phi=1.0, num_prompts=100)
        return length_controlled(shares, extra, prompts, seed=seed).rate

    assert coverage(interval, rate, draws=500) >= 0.92
