import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import ConfigError, ObjectiveConfig
from kto_jax.losses import kto_loss
from kto_jax.objectives import auto_weights, make_objective

auto = ObjectiveConfig(desirable_weight="auto")


@pytest.mark.parametrize("desirable, undesirable, expected", [
    (100, 300, (3.0, 1.0)), (400, 200, (1.0, 1.5)), (100, 100, (1.0, 1.0)), (400, 300, (1.0, 1.0)), (5, 4, (1.0, 1.0)),
])  # fmt: skip
def test_auto_raises_the_weight_that_must_rise(desirable, undesirable, expected):
    weights = auto_weights(auto, desirable, undesirable)
    assert weights == pytest.approx(expected)
    ratio = weights[0] * desirable / (weights[1] * undesirable)
    assert 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9


def test_numbers_are_taken_as_they_are():
    config = ObjectiveConfig(desirable_weight=13.33, undesirable_weight=0.5)
    assert auto_weights(config, 10, 1000) == (13.33, 0.5)


def test_auto_beside_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"stands beside undesirable_weight=5.0"):
        auto_weights(dataclasses.replace(auto, undesirable_weight=5.0), 10, 10)


def test_auto_with_one_class_is_refused():
    with pytest.raises(ConfigError, match="0 undesirable"):
        auto_weights(auto, 10, 0)


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'kto'"):
        make_objective(ObjectiveConfig(name="ktoo"), num_desirable=1, num_undesirable=1)


def test_kto_uses_the_resolved_weights():
    objective = make_objective(auto, num_desirable=100, num_undesirable=300)
    policy, reference, desirable = jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)), jnp.array([[True, False]])
    expected = kto_loss(policy, reference, desirable, jnp.array(0.5), desirable_weight=3.0)
    np.testing.assert_array_equal(objective.loss(policy, reference, desirable, jnp.array(0.5)), expected)


def test_parity_mode_divides_by_the_nonzero_log_ratios():
    policy, reference = jnp.array([4.0, 1.0, 9.0]), jnp.array([1.0, 1.0, 0.0])
    where = jnp.array([True, True, False])
    config = ObjectiveConfig()
    for nonzero, expected in ((False, 1.5), (True, 3.0)):
        objective = make_objective(
            dataclasses.replace(config, kl_nonzero_mean=nonzero), num_desirable=1, num_undesirable=1
        )
        assert objective.reference_point(policy, reference, where) == expected
