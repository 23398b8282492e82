"""Simulated verdicts, whose true win rate is known."""

import numpy as np


def draw_verdicts(rng, win_rate, num_prompts, num_samples=1, ties=0.0, spread=0.0):
    """Shares of wins and their prompts; `spread` is the standard deviation of the prompts' own win rates."""
    own = np.clip(win_rate + spread * rng.standard_normal(num_prompts), 0, 1)
    prompts = np.repeat(np.arange(num_prompts), num_samples)
    shares = (rng.random(len(prompts)) < own[prompts]).astype(float)
    return np.where(rng.random(len(prompts)) < ties, 0.5, shares), prompts


def coverage(make_interval, true, draws):
    """The share of simulated data sets whose interval holds the true value."""
    held = [make_interval(seed) for seed in range(draws)]
    return sum(interval.low <= true <= interval.high for interval in held) / draws
