"""Every objective trains, on 8 devices: what it calls its margin rises, and falls where the labels are flipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReferenceConfig,
)
from kto_jax.evaluation import make_evaluation
from kto_jax.inputs import make_plans
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.objectives import OBJECTIVES, make_objective
from kto_jax.sharding import constrainer, make_mesh, place_batch, shardings
from kto_jax.state import create_state, make_optimizer, make_schedule
from kto_jax.step import _synced, jit_train_step
from tests.synthetic import make_index

ARCHITECTURE = TransformerConfig(
    vocab_size=98, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, tied_head=True
)
EIGHT, ONE = MeshConfig(data=4, fsdp=2), MeshConfig(data=1)
STEPS = 20
FROZEN = ReferenceConfig()
CONTROLS = (np.array([1, 2], np.int32), np.array([1, 1], np.int32))
CONFIG = Config(
    model=ModelConfig(path="x"), data=DataConfig(train="x", max_length=40, max_prompt_length=19), batch_size=16,
    microbatch_rows=8, epochs=10,
)  # fmt: skip


@functools.cache
def feedback(flipped):
    """Pairs whose chosen completions are written in low tokens and whose rejected ones in high ones, or flipped."""
    index = make_index(128, paired=True)
    index.splits[96:] = 1
    for row in range(128):
        start, end = index.offsets[row] + index.prompt_lengths[row], index.offsets[row + 1]
        high = (row % 2 == 0) == (flipped and row < 96)
        index.tokens[start:end] = index.tokens[start:end] % 20 + (60 if high else 20)
    index.scores[:] = np.where(index.desirable, 2.0, -1.0)
    return index


def train(objective_config, flipped=False, mesh_config=EIGHT, reference_config=FROZEN):
    """Held-out figures by the true labels before and after 20 steps, the figures of the steps, the last state."""
    index = feedback(flipped)
    mesh = mesh_of(mesh_config)
    objective, model, optimizer, take_step, evaluation = programs(objective_config, mesh_config, reference_config)
    plan, _ = make_plans(CONFIG, index, objective, CONTROLS if objective.controls else None)
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    policy = jax.device_put(first_policy(model.scorer), layout)
    trunk = {name: leaf for name, leaf in policy.items() if name != "scorer"}
    state = create_state(policy, trunk if objective.uses_reference else {}, optimizer, mesh, objective.initial_state)
    before, history = evaluation(state), []
    for step in range(STEPS):
        state, figures = take_step(state, place_batch(mesh, plan.batch(step)))
        history.append({name: float(value) for name, value in jax.device_get(figures).items()})
    return before, evaluation(state), history, state


def mesh_of(config):
    return make_mesh(config, jax.devices()[: 8 if config is EIGHT else 1])


@functools.cache
def first_policy(scorer):
    return jax.device_get(Model.create(ARCHITECTURE, scorer=scorer).init_params(jax.random.key(0), "float32"))


@functools.cache
def programs(objective_config, mesh_config, reference_config):
    """Compiled once for both ways round."""
    mesh = mesh_of(mesh_config)
    objective = make_objective(objective_config, num_desirable=1, num_undesirable=1)
    model = Model.create(ARCHITECTURE, constrain=constrainer(mesh), scorer=objective.scorer)
    config = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, schedule="constant")
    schedule = make_schedule(config, STEPS)
    optimizer = make_optimizer(config, schedule, value_head=model.scorer == "value")
    _, held_out = make_plans(CONFIG, feedback(False), objective, CONTROLS if objective.controls else None)
    take_step = jit_train_step(model, objective, optimizer, schedule, reference_config)
    return objective, model, optimizer, take_step, make_evaluation(model, objective, held_out, mesh)


def check_both_ways(objective_config, mesh_config):
    before, after, history, _ = train(objective_config, mesh_config=mesh_config)
    assert after["eval_margin"] > before["eval_margin"]
    assert after["eval_loss"] < before["eval_loss"]
    assert all(np.isfinite(row["loss"]) and row["num_bad_steps"] == 0 for row in history)
    _, after_flipped, _, _ = train(objective_config, flipped=True, mesh_config=mesh_config)
    assert after_flipped["eval_margin"] < before["eval_margin"]


VARIANTS = [
    *(("kto", {"variant": v}) for v in (
        "zero", "log_sigmoid", "identity", "kahneman_tversky", "reference_free", "simple"
    )),
    *(("dpo", {"variant": v}) for v in (
        "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"
    )),
    *(("dpo", {"f_divergence": f}) for f in ("forward_kl", "js", "alpha")),
    ("ppo_offline", {"rewards": "scores"}),
]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_moves_its_margin_the_right_way_and_flipped_labels_the_other_way(name):
    check_both_ways(ObjectiveConfig(name=name), EIGHT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda value: "-".join(map(str, dict(value=value).values())))
def test_every_variant_does_too(name, options):
    check_both_ways(ObjectiveConfig(name=name, **options), ONE)


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])


def test_a_synced_reference_is_the_policy_only_from_the_step_after():
    """So that whoever measures or saves the state after step 10 or 20 sees what the policy has gained."""
    sync = ReferenceConfig(sync_every=10, sync_mix=1.0)
    _, after, history, state = train(ObjectiveConfig(name="apo_zero_unpaired"), mesh_config=ONE, reference_config=sync)
    assert history[9]["margin"] > 0.1
    assert history[10]["margin"] == 0  # the first step beside the new reference
    assert after["eval_margin"] > 0.1
    assert np.max(np.abs(flat(state.reference) - flat(first_policy("none")))) > 0.01


@pytest.mark.parametrize("every, step, moves", [(3, 6, True), (3, 5, False), (3, 0, False), (0, 6, False)])
def test_the_reference_moves_when_it_is_due_and_at_no_other_time(every, step, moves):
    reference, policy = {"w": jnp.array([1.0], jnp.bfloat16)}, {"w": jnp.array([3.0]), "scorer": jnp.array([9.0])}
    synced = _synced(reference, policy, jnp.array(step), ReferenceConfig(sync_every=every, sync_mix=0.5))
    assert synced == {"w": jnp.array([2.0 if moves else 1.0])}
    assert synced["w"].dtype == jnp.bfloat16


def test_bco_goes_on_from_the_mean_of_the_rewards_so_far():
    history = train(ObjectiveConfig(name="bco"))[2]
    assert history[0]["running_mean"] == 0  # the policy is still the reference
    assert history[-1]["running_count"] == sum(row["examples"] for row in history)
    assert history[-1]["running_mean"] != 0


def test_the_value_head_learns():
    """Values leave 0, where they start; the frozen reference has no such head."""
    state = train(ObjectiveConfig(name="ppo_offline"))[3]
    assert float(np.abs(jax.device_get(state.policy["scorer"]["last"]["weight"])).max()) > 0
    assert "scorer" not in state.reference
