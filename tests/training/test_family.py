"""Every objective trains: its margin rises, and falls if the labels are flipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReferenceConfig,
)
from kto_jax.devices.sharding import constrainer, make_mesh, place_batch, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model
from kto_jax.objectives import OBJECTIVES, make_objective
from kto_jax.training.evaluation import make_evaluation
from kto_jax.training.inputs import make_schedules
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.state import create_state
from kto_jax.training.step import Recipe, jit_train_step
from kto_jax.training.sync import sync_reference
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
    schedule, _ = make_schedules(CONFIG, index, objective, CONTROLS if objective.controls else None)
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    policy = jax.device_put(first_policy(model.scalar_head), layout)
    trunk = {name: leaf for name, leaf in policy.items() if name != "scorer"}
    state = create_state(policy, trunk if objective.uses_reference else {}, optimizer, mesh, objective.initial_state)
    before, history = evaluation(state), []
    for step in range(STEPS):
        state, figures = take_step(state, place_batch(mesh, schedule.batch(step)))
        history.append({name: float(value) for name, value in jax.device_get(figures).items()})
    return before, evaluation(state), history, state


def mesh_of(config):
    return make_mesh(config, jax.devices()[: 8 if config is EIGHT else 1])


@functools.cache
def first_policy(head):
    return jax.device_get(Model.create(ARCHITECTURE, scalar_head=head).init_params(jax.random.key(0), "float32"))


@functools.cache
def programs(objective_config, mesh_config, reference_config):
    """Compiled once for both labellings."""
    mesh = mesh_of(mesh_config)
    objective = make_objective(objective_config, num_desirable=1, num_undesirable=1)
    model = Model.create(ARCHITECTURE, layout=Layout(constrain=constrainer(mesh)), scalar_head=objective.scalar_head)
    config = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, schedule="constant")
    learning_rate = make_learning_rate(config, STEPS)
    optimizer = make_optimizer(config, learning_rate, value_head=model.scalar_head == "value")
    _, held_out = make_schedules(CONFIG, feedback(False), objective, CONTROLS if objective.controls else None)
    take_step = jit_train_step(Recipe(model, objective, optimizer, learning_rate, reference_config))
    return objective, model, optimizer, take_step, make_evaluation(model, objective, held_out, mesh)


def check_both_ways(objective_config, mesh_config):
    before, after, history, _ = train(objective_config, mesh_config=mesh_config)
    assert after["eval_margin"] > before["eval_margin"]
    # What these two clip or weigh depends on the policy, so their losses at two policies cannot be compared.
    assert after["eval_loss"] < before["eval_loss"] or objective_config.variant in ("gspo", "cispo")
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
    *(("grpo", {"variant": v}) for v in ("grpo", "rloo", "dapo", "gspo", "cispo")),
]  # fmt: skip


# PPO reads figures of sampled tokens: tests/objectives/test_presets.py and tests/commands/test_online.py.
OFFLINE = [name for name in OBJECTIVES if name != "ppo"]
# One of each kind: a reference point and a value head; a running mean, pairs and a reward head. A whole run of SFT is
# in test_reference.py.
QUICK, SLOW = ("kto", "ppo_offline"), ("bco", "dpo", "reward")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow if name in SLOW else pytest.mark.nightly)
    for name in OFFLINE
])  # fmt: skip
def test_every_objective_raises_its_margin_and_flipped_labels_lower_it(name):
    check_both_ways(ObjectiveConfig(name=name), ONE)


# Over meshes test_step.py compares the numbers themselves.
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.nightly if name == "kto" else pytest.mark.exhaustive) for name in OFFLINE
])  # fmt: skip
def test_every_objective_raises_its_margin_on_8_devices(name):
    check_both_ways(ObjectiveConfig(name=name), EIGHT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda value: "-".join(map(str, dict(value=value).values())))
def test_every_variant_raises_its_margin_and_flipped_labels_lower_it(name, options):
    check_both_ways(ObjectiveConfig(name=name, **options), ONE)


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])


def test_a_synced_reference_is_the_policy_only_from_the_step_after():
    """So that an evaluation or checkpoint after step 10 or 20 shows the policy's gain."""
    sync = ReferenceConfig(sync_every=10, sync_mix=1.0)
    _, after, history, state = train(ObjectiveConfig(name="apo_zero_unpaired"), mesh_config=ONE, reference_config=sync)
    assert history[9]["margin"] > 0.1
    assert history[10]["margin"] == 0  # the first step with the new reference
    assert after["eval_margin"] > 0.1
    assert np.max(np.abs(flat(state.reference) - flat(first_policy("none")))) > 0.01


@pytest.mark.parametrize("every, step, moves", [(3, 6, True), (3, 5, False), (3, 0, False), (0, 6, False)])
def test_the_reference_moves_when_it_is_due_and_at_no_other_time(every, step, moves):
    reference, policy = {"w": jnp.array([1.0], jnp.bfloat16)}, {"w": jnp.array([3.0]), "scorer": jnp.array([9.0])}
    result = sync_reference(reference, policy, jnp.array(step), ReferenceConfig(sync_every=every, sync_mix=0.5))
    assert result == {"w": jnp.array([2.0 if moves else 1.0])}
    assert result["w"].dtype == jnp.bfloat16


def moved(reference, policy, *, mix, moves=1, first=1):
    def move(step, reference):
        return sync_reference(reference, policy, step, ReferenceConfig(sync_every=1, sync_mix=mix))

    return jax.jit(lambda reference: jax.lax.fori_loop(first, first + moves, move, reference))(reference)


def test_small_moves_of_a_bfloat16_reference_add_up():
    policy = {"w": jnp.full(8192, 1.002)}  # The spacing of bfloat16 is 0.008 there.
    ends = [
        float(jnp.mean(moved({"w": jnp.ones(8192, dtype)}, policy, mix=0.05, moves=40)["w"].astype(jnp.float32)))
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert ends[0] == pytest.approx(1 + 0.002 * (1 - 0.95**40), abs=1e-6)
    assert ends[1] == pytest.approx(ends[0], abs=1e-4)


def test_moves_of_a_bfloat16_reference_differ_by_step_and_by_array_but_not_by_mesh():
    spec, policy = PartitionSpec("fsdp", "tensor"), {name: jnp.full((16, 24), 1.002) for name in ("a", "b")}
    reference = {name: jnp.ones((16, 24), jnp.bfloat16) for name in policy}
    first = moved(reference, policy, mix=0.5)
    other = moved(reference, policy, mix=0.5, first=2)
    assert len({np.asarray(x).tobytes() for x in (first["a"], first["b"], other["a"], other["b"])}) == 4
    layout = NamedSharding(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), spec)
    spread = moved(*jax.device_put((reference, policy), layout), mix=0.5)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == jax.device_get(y))), first, spread))


def test_a_sync_is_exact_in_float32_and_rounds_to_nearest_for_a_full_copy():
    # 20 bits, so that float32 represents the mean exactly and bfloat16 neither of the two.
    old, new = (np.random.default_rng(seed).integers(1 << 20, size=999).astype(np.float32) for seed in (0, 1))
    mixed = moved({"w": jnp.asarray(old)}, {"w": jnp.asarray(new)}, mix=0.5)["w"]
    np.testing.assert_array_equal(mixed, (old + new) / 2)
    copied = moved({"w": jnp.asarray(old, jnp.bfloat16)}, {"w": jnp.asarray(new)}, mix=1.0)["w"]
    np.testing.assert_array_equal(copied.astype(jnp.float32), jnp.asarray(new, jnp.bfloat16).astype(jnp.float32))


def test_bco_continues_from_the_mean_of_the_rewards_so_far():
    history = train(ObjectiveConfig(name="bco"), mesh_config=ONE)[2]
    assert history[0]["running_mean"] == 0  # the policy is still the reference
    assert history[-1]["running_count"] == sum(row["examples"] for row in history)
    assert history[-1]["running_mean"] != 0


def test_the_value_head_learns():
    """Values move from 0, where they start; the frozen reference has no such head."""
    state = train(ObjectiveConfig(name="ppo_offline"), mesh_config=ONE)[3]
    assert float(np.abs(jax.device_get(state.policy["scorer"]["last"]["weight"])).max()) > 0
    assert "scorer" not in state.reference
