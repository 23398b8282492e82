"""Pairs that contradict each other, on a model: each completion is once chosen and once rejected.

KTO's gradient is zero for every policy (arXiv 2402.01306, theorem 4.3); DPO moves the policy until rewards are equal.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kto_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.objectives import make_objective
from kto_jax.training.inputs import make_schedules
from kto_jax.training.state import TrainState
from kto_jax.training.step import loss_and_gradient, reference_point
from tests.synthetic import make_index

NUM_PAIRS = 16
MODEL = Model.create(
    TransformerConfig(
        vocab_size=98, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_head=True
    )
)


def contradictory():
    """Every pair of an index, followed by every pair reversed."""
    index = make_index(2 * NUM_PAIRS, paired=True)
    swapped = np.arange(2 * NUM_PAIRS).reshape(-1, 2)[:, ::-1].reshape(-1)
    order = np.concatenate([np.arange(2 * NUM_PAIRS), swapped])
    lengths = np.diff(index.offsets)[order]
    rows = np.arange(len(order))
    return dataclasses.replace(
        index,
        tokens=np.concatenate([index.tokens[index.offsets[row] : index.offsets[row + 1]] for row in order]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=index.prompt_lengths[order],
        prompt_hashes=index.prompt_hashes[order],
        weights=np.ones(len(order), np.float32),
        scores=index.scores[order],
        desirable=rows % 2 == 0,
        rejected=np.where(rows % 2 == 0, rows + 1, -1),
        splits=np.zeros(len(order), np.uint8),
        places=index.places[order],
    )


@functools.cache
def problem(name):
    """(loss, reference point, gradient, rewards) of all pairs as a function of the policy; policy; reference."""
    objective = make_objective(ObjectiveConfig(name=name), num_desirable=1, num_undesirable=1)
    config = Config(
        model=ModelConfig(path="x"), data=DataConfig(train="x", max_length=38, max_prompt_length=19), batch_size=64
    )
    batch = jax.tree.map(jnp.asarray, make_schedules(config, contradictory(), objective, None)[0].batch(0))
    policy = MODEL.init_params(jax.random.key(0), "float32")
    noise = MODEL.init_params(jax.random.key(1), "float32")
    reference = jax.tree.map(lambda leaf, other: leaf + 2 * other, policy, noise)

    @jax.jit
    def measure(policy):
        state = TrainState(0, policy, reference, (), {}, 0)
        point, _, tied = reference_point(MODEL, objective, state, batch)
        loss, gradient, completions = loss_and_gradient(MODEL, objective, state, tied, point)
        return loss, point, gradient, jnp.where(completions.filled, objective.rewards(completions), 0)

    return measure, policy, reference


def gap_of_rewards(rewards):
    return float(jnp.sum(jnp.abs(rewards[..., 0::2] - rewards[..., 1::2]))) / (2 * NUM_PAIRS)


def test_kto_has_no_gradient_though_rewards_differ_and_z0_is_large():
    measure, policy, _ = problem("kto")
    loss, z0, gradient, rewards = measure(policy)
    assert z0 > 0.5
    assert float(jnp.max(jnp.abs(rewards))) > 0.1
    assert loss == pytest.approx(0.5, abs=1e-6)
    assert optax.tree.norm(gradient) < 1e-6 * optax.tree.norm(problem("dpo")[0](policy)[2])


def test_dpo_is_stationary_where_the_rewards_are_equal_and_nowhere_else():
    measure, policy, reference = problem("dpo")
    loss, _, gradient, rewards = measure(reference)
    assert gap_of_rewards(rewards) < 1e-5
    assert loss == pytest.approx(np.log(2), abs=1e-6)
    at_equal_rewards = float(optax.tree.norm(gradient))
    away = float(optax.tree.norm(measure(policy)[2]))
    assert at_equal_rewards < 1e-5 * away


def test_dpo_descends_to_equal_rewards():
    measure, policy, _ = problem("dpo")
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(policy)
    first = gap_of_rewards(measure(policy)[3])

    @jax.jit
    def descend(policy, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, policy)
        return optax.apply_updates(policy, updates), opt_state

    for _ in range(60):
        policy, opt_state = descend(policy, opt_state, measure(policy)[2])
    assert gap_of_rewards(measure(policy)[3]) < first / 5
