"""Every preset of the policy gradient, from rewards to loss and gradient, against float64 numbers worked out by hand.

pytest tests/objectives/test_presets.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import online_errors
from kto_jax.config import ObjectiveConfig
from kto_jax.objectives import make_objective
from kto_jax.shapes import Completions, TokenScores
from tests.objectives.presets import (
    BY_CONSTANT,
    BY_SEQUENCE,
    BY_TOKEN,
    CASES,
    COUNT,
    LENGTHS,
    TOLERANCE,
    TOTAL,
    differences,
    group_advantages,
    loss_of,
    objective_of,
    sampled_of,
    tokens,
)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_worked_out_by_hand(name):
    for found, expected in differences(name):
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("error, code", [(9e-6, 0), (2e-5, 1)])
def test_the_table_of_errors_shows_what_exceeds_the_tolerance(monkeypatch, capsys, error, code):
    monkeypatch.setattr(online_errors, "CASES", {"grpo": None})
    exact = (np.array([1.0, 200.0]),) * 2
    off = np.array([1.0, 200.0 + 200 * error])  # relative to the larger value
    monkeypatch.setattr(online_errors, "differences", lambda name: [exact, (off, exact[0]), exact])
    assert online_errors.main() == code
    printed = capsys.readouterr().out
    assert f"{error:.1e}" in printed and f"{1 - code} of 1" in printed


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "ppo"])
def test_at_ratio_1_every_preset_is_reinforce_and_nothing_is_clipped(name):
    objective = objective_of(name, {})
    sampled = sampled_of(objective, jnp.float32)
    weights = {"tokens": BY_TOKEN, "examples": BY_CONSTANT if name in ("dr_grpo", "rloo") else BY_SEQUENCE}
    slope = jax.grad(functools.partial(loss_of, objective), argnums=1)(
        sampled, sampled.old_logps, jnp.zeros_like(sampled.old_logps)
    )
    np.testing.assert_allclose(slope[0], -weights[objective.mean_over] * sampled.advantages[0], atol=1e-6)


def test_the_figures_are_shares_of_tokens():
    objective = objective_of("dapo", {})
    sampled = sampled_of(objective, jnp.float32)
    policy, old, reference, *_ = tokens()
    segments = jnp.asarray([np.repeat(np.arange(1, COUNT + 1), LENGTHS)])
    zeros = jnp.zeros((1, COUNT))
    scores = TokenScores(jnp.asarray([policy]), sampled.old_logps, jnp.zeros((1, TOTAL)), segments, sampled)
    seen = Completions(zeros, zeros, zeros, zeros, zeros > 0, zeros, zeros == 0, tokens=scores)
    found = {name: float(jnp.sum(sums)) for name, sums in objective.figures(seen).items()}
    a, rho = group_advantages("group", True), np.exp(policy - old)
    assert found["clipped"] == np.sum((a > 0) & (rho > 1.28) | (a < 0) & (rho < 0.8)) > 0
    d = policy - reference
    assert found["reference_kl"] == pytest.approx(np.sum(np.exp(-d) - 1 + d), rel=1e-4)
    assert found["old_kl"] == pytest.approx(np.sum(rho - 1 - np.log(rho)), rel=1e-4)


@pytest.mark.parametrize("options, what", [
    ({"length_scale": 9.0, "variant": "dapo"}, "only \"constant\" uses it"),
    ({"dual_clip": 0.5}, "dual_clip=0.5 with surrogate='clip'. It is above 1"),
    ({"dual_clip": 3.0, "variant": "cispo"}, "surrogate='cispo'"),
    ({"kl_weight": 0.1, "kl_target": 6.0}, "only a positive weight of the KL in the rewards is adapted"),
    ({"kl_horizon": 5.0}, "kl_horizon=5.0 without kl_target"),
    ({"kl_weight": 0.1, "old_logps": "reference"}, "whose reference stands for the policy that sampled"),
])  # fmt: skip
def test_options_without_an_effect_are_refused(options, what):
    config = ObjectiveConfig(name="grpo", **({"old_logps": "sampled"} | options))
    with pytest.raises(Exception, match=what):
        make_objective(config, num_desirable=1, num_undesirable=1)


def test_an_option_may_be_set_alone():
    config = ObjectiveConfig(name="grpo", variant="grpo", normalise="constant", length_scale=5.0, scale="none")
    objective = make_objective(config, num_desirable=1, num_undesirable=1)
    assert objective.mean_over == "examples" and objective.advantages.scale == "none"
