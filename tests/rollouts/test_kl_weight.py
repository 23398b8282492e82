"""The weight of the KL, adapted from round to round, against numbers worked out by hand."""

import pytest

from kto_jax.config import ConfigError
from kto_jax.objectives.record import Advantages
from kto_jax.rollouts.kl_weight import next_weight, rule_of_round

RULE = Advantages("gae", kl_weight=0.5, kl_target=4.0, kl_horizon=100.0)


@pytest.mark.parametrize("kl, expected", [
    (4.0, 0.5),  # at the target
    (4.4, 0.5 * (1 + 0.1 * 40 / 100)),  # a tenth above it
    (3.6, 0.5 * (1 - 0.1 * 40 / 100)),
    (100.0, 0.5 * (1 + 0.2 * 40 / 100)),  # no more than a fifth counts
    (0.0, 0.5 * (1 - 0.2 * 40 / 100)),
    (-3.0, 0.5 * (1 - 0.2 * 40 / 100)),  # an estimate from samples may be negative
])  # fmt: skip
def test_the_weight_moves_by_the_distance_from_the_target(kl, expected):
    assert next_weight(0.5, kl, 40, RULE) == pytest.approx(expected, rel=1e-12)


def test_the_weight_of_a_round_follows_from_the_round_before():
    log = [{"kl_weight": 9.0, "kl_completion": 4.0, "completions": 40.0},
           {"kl_weight": 2.0, "kl_completion": 8.0, "completions": 50.0}]  # fmt: skip
    assert rule_of_round(RULE, []) == RULE
    assert rule_of_round(RULE, log).kl_weight == 2.0 * (1 + 0.2 * 50.0 / 100)
    fixed = Advantages("gae", kl_weight=0.5)
    assert rule_of_round(fixed, [{"round": 0}]) == fixed


def test_a_weight_stays_positive():
    log = [{"kl_weight": 1.0, "kl_completion": 0.0, "completions": 500.0}]
    with pytest.raises(ConfigError, match="kl_horizon=100 with 500 completions"):
        rule_of_round(RULE, log)
