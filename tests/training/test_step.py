"""The step compared with a naive version: one example at a time, all logits, KTO in NumPy and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kto_jax.training.step
from kto_jax.config import LoraConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import make_mesh, place_batch, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.lora import init_adapters
from kto_jax.models.model import Model
from kto_jax.objectives import make_objective
from kto_jax.training.flops import tokens_and_flops
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.routers import NO_ROUTERS, RouterWeights
from kto_jax.training.state import TrainState, create_state
from kto_jax.training.step import (
    Recipe,
    _run_after,
    evaluation_step,
    jit_train_step,
    loss_and_gradient,
    reference_error,
    reference_point,
    train_step,
)
from tests import synthetic
from tests.losses import oracle
from tests.synthetic import make_index

CONFIG = TransformerConfig(
    vocab_size=98, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_head=True
)
OBJECTIVE = make_objective(ObjectiveConfig(desirable_weight=1.5, beta=0.3), num_desirable=1, num_undesirable=1)
BATCH, MAX_LENGTH = 64, 38


@functools.cache
def parameters(dtype):
    """A policy and a reference far apart: the reference is more confident, so z0 is clearly positive."""
    with jax.enable_x64(True):
        model = Model.create(CONFIG, dtype="float64")
        policy = model.init_params(jax.random.key(0), "float64")
        noise = model.init_params(jax.random.key(1), "float64")
        reference = jax.tree.map(lambda leaf, other: leaf + 2 * other, policy, noise)
        return jax.device_get(jax.tree.map(lambda leaf: leaf.astype(dtype), (policy, reference)))


def make_schedule(row_length, microbatch_rows, **index_options):
    index = make_index(BATCH, max_length=MAX_LENGTH, **index_options)
    return index, synthetic.make_schedule(
        index, batch_size=BATCH, seed=3, row_length=row_length, microbatch_rows=microbatch_rows, max_length=MAX_LENGTH
    )


def naive(dtype):
    """z0, loss and gradient from the sequences themselves, one by one."""
    policy, reference = parameters(dtype)
    model = Model.create(CONFIG, dtype=dtype)
    index, schedule = make_schedule(MAX_LENGTH, 8)
    step = schedule.step(0)

    def sequences(prompts, completions):
        """Ids padded at the end [B, L], and which of the predicted tokens are the completion's [B, L - 1]."""
        ids, where = np.zeros((BATCH, MAX_LENGTH), np.int32), np.zeros((BATCH, MAX_LENGTH - 1), bool)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            sequence = np.concatenate([index.prompt(prompt), index.completion(completion)])[:MAX_LENGTH]
            ids[i, : len(sequence)] = sequence
            where[i, len(index.prompt(prompt)) - 1 : len(sequence) - 1] = True
        return jnp.array(ids), jnp.array(where)

    @jax.jit
    def logps(params, ids, where):
        hidden = model.hidden_states(
            params, ids, jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(MAX_LENGTH)[None], ids.shape)
        )
        dense = jax.nn.log_softmax(model.logits(params, hidden))
        chosen = jnp.take_along_axis(dense[:, :-1], ids[:, 1:, None], 2)[..., 0]
        return jnp.sum(jnp.where(where, chosen, 0), axis=1)

    unmatched, matched = sequences(step.ids, step.partners), sequences(step.ids, step.ids)
    z0 = oracle.reference_point(logps(policy, *unmatched), logps(reference, *unmatched), [True] * BATCH)
    matched_logps = np.asarray(logps(policy, *matched)), np.asarray(logps(reference, *matched))
    weights = index.weights[step.ids]
    losses, slopes = oracle.kto(*matched_logps, index.desirable[step.ids], z0, 0.3, 1.5, 1.0)
    gradient = jax.grad(lambda params: jnp.sum(slopes * weights / BATCH * logps(params, *matched)))(policy)
    return z0, float(np.mean(losses * weights)), gradient, np.subtract(*matched_logps)


def close_by_norm(got, expected, tolerance):
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, jax.device_get(got), jax.device_get(expected)))
    return difference <= tolerance * optax.tree.norm(jax.device_get(expected))


@functools.cache
def naive_float64():
    return jax.device_get(naive("float64"))


def packed_result(dtype, mesh_config, row_length, microbatch_rows, num_devices=8):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = Model.create(
        CONFIG,
        dtype=dtype,
        layout=make_layout(mesh),
    )
    layout = shardings(mesh, model.logical_axes(), model.abstract_params(dtype))
    policy, reference = (jax.device_put(params, layout) for params in parameters(dtype))
    batch = make_schedule(row_length, microbatch_rows)[1].batch(0)
    num_microbatches = int(batch.num_matched)

    @jax.jit
    def run(policy, reference, batch):
        state = TrainState(0, policy, reference, (), {}, 0)
        z0, figures, batch = reference_point(model, OBJECTIVE, state, batch)
        return z0, figures, *loss_and_gradient(model, OBJECTIVE, state, batch, z0)

    return num_microbatches, *jax.device_get(run(policy, reference, place_batch(mesh, batch)))


MESHES = {
    "1": (MeshConfig(), 1),
    "8x1": (MeshConfig(data=8), 8),
    "4x2": (MeshConfig(data=4, fsdp=2), 8),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    # Several rows at once are slower here, but correct.
    "2x1x4": (MeshConfig(data=2, sequence=4), 8),
}
# (tokens of a row, rows of a microbatch, microbatches): unpacked rows hold one example each, packed ones several.
UNPACKED = [(38, 64, 1), (38, 32, 2), (38, 16, 4)]
PACKED = [(80, 32, 1), (80, 16, 2), (80, 8, 4)]
QUICK, SLOW = [("2x2x2", PACKED[2])], [("2x1x4", PACKED[2])]
NIGHTLY = [("1", UNPACKED[0]), ("1", PACKED[2]), ("8x1", PACKED[1]), ("4x2", UNPACKED[2])]
ALL = [(mesh, layout) for mesh in MESHES for layout in UNPACKED + PACKED]
REST = [case for case in ALL if case not in QUICK + SLOW + NIGHTLY]
CASES = [
    *QUICK,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in REST),
]


@pytest.mark.parametrize("mesh, layout", CASES)
def test_meshes_microbatches_and_packing_change_nothing_in_float64(mesh, layout):
    with jax.enable_x64(True):
        z0, loss, gradient, log_ratios = naive_float64()
        assert z0 > 0.5
        assert np.mean(np.abs(0.3 * log_ratios)) > 0.1
        got = packed_result("float64", MESHES[mesh][0], *layout[:2], MESHES[mesh][1])
        num_microbatches, got_z0, figures, got_loss, got_gradient, _ = got
        assert num_microbatches == layout[2]
        assert got_z0 == pytest.approx(z0, rel=1e-10)
        assert figures["num_unmatched"] == BATCH
        assert got_loss == pytest.approx(loss, rel=1e-10)
        assert close_by_norm(got_gradient, gradient, 1e-10)


@pytest.mark.parametrize("mesh, layout", [
    ("1", UNPACKED[0]), pytest.param("2x2x2", PACKED[2], marks=pytest.mark.nightly),
])  # fmt: skip
def test_meshes_microbatches_and_packing_change_only_rounding_in_float32(mesh, layout):
    with jax.enable_x64(True):
        z0, loss, gradient, _ = naive_float64()
    _, got_z0, _, got_loss, got_gradient, _ = packed_result("float32", MESHES[mesh][0], *layout[:2], MESHES[mesh][1])
    assert got_z0 == pytest.approx(z0, rel=1e-5)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert close_by_norm(got_gradient, gradient, 1e-5)


@functools.cache
def plain_step():
    return one_step()


@functools.cache
def step_on_one_device(dtype):
    """Compiled once for all batches: (mesh, model, optimizer, step)."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Model.create(CONFIG, dtype=dtype, layout=make_layout(mesh))
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="constant")
    learning_rate = make_learning_rate(config, 20)
    optimizer = make_optimizer(config, learning_rate)
    return mesh, model, optimizer, jit_train_step(Recipe(model, OBJECTIVE, optimizer, learning_rate))


def one_step(num_prompts=None, dtype="float32", **changes):
    """One step on one device: (state before, state after, figures)."""
    mesh, model, optimizer, step = step_on_one_device(dtype)
    policy, reference = jax.device_put(parameters("float32"), jax.devices()[0])
    state = create_state(policy, reference, optimizer, mesh, {})
    before = jax.device_get(state)
    batch = dataclasses.replace(make_schedule(96, 8, num_prompts=num_prompts)[1].batch(0), **changes)
    after, figures = step(state, place_batch(mesh, batch))
    return before, jax.device_get(after), jax.device_get(figures), model, batch


def test_a_step_updates_the_policy_and_not_the_reference():
    before, after, figures, _, batch = plain_step()
    assert after.step == 1
    assert after.num_bad_steps == 0
    assert not np.array_equal(before.policy["embed"]["table"], after.policy["embed"]["table"])
    jax.tree.map(np.testing.assert_array_equal, before.reference, after.reference)
    assert figures["tokens"] == np.sum(batch.matched.segment_ids > 0)
    assert figures["examples"] == BATCH


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted():
    weights = np.array(plain_step()[4].weights)
    weights[0, 0, 0] = np.nan
    before, after, figures, _, _ = one_step(weights=weights)
    assert np.isnan(figures["loss"])
    assert after.step == 1
    assert after.num_bad_steps == figures["num_bad_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, (before.policy, before.opt_state), (after.policy, after.opt_state))


def steps_on_two_devices(batches):
    """Steps of one program on a mesh of two devices: the states, from the first on, and the figures."""
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    model = Model.create(CONFIG, dtype="float32", layout=make_layout(mesh))
    config = OptimizerConfig(learning_rate=1.0, schedule="constant")
    learning_rate = make_learning_rate(config, 20)
    optimizer = make_optimizer(config, learning_rate)
    step = jit_train_step(Recipe(model, OBJECTIVE, optimizer, learning_rate))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    state = create_state(*(jax.device_put(params, layout) for params in parameters("float32")), optimizer, mesh, {})
    states, all_figures = [jax.device_get(state)], []
    for batch in batches:
        state, figures = step(state, place_batch(mesh, batch))
        states.append(jax.device_get(state))
        all_figures.append(jax.device_get(figures))
        for leaf in jax.tree.leaves(state.policy):
            one, *others = (shard.data for shard in leaf.addressable_shards)
            assert all(np.array_equal(one, other) for other in others)
    return states, all_figures


def moved(before, after):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)))


@pytest.mark.slow
def test_nan_on_one_device_changes_nothing_on_any_and_the_next_step_is_normal():
    good = make_schedule(96, 8)[1].batch(0)
    weights = np.array(good.weights)
    weights[0, -1, 0] = np.nan  # Of the last row of a microbatch: the second device's.
    states, figures = steps_on_two_devices([good, dataclasses.replace(good, weights=weights), good])
    assert [state.num_bad_steps for state in states] == [0, 0, 1, 0]
    assert [bool(np.isfinite(one["loss"])) for one in figures] == [True, False, True]
    assert not moved((states[1].policy, states[1].opt_state), (states[2].policy, states[2].opt_state))
    assert moved(states[0].policy, states[1].policy) and moved(states[2].policy, states[3].policy)


@pytest.mark.slow
def test_an_infinite_gradient_of_one_weight_changes_nothing_though_the_loss_is_finite(monkeypatch):
    true = kto_jax.training.step.loss_and_gradient

    def poisoned(model, objective, state, *given):
        loss, gradient, completions = true(model, objective, state, *given)
        table = gradient["embed"]["table"]
        bad = jnp.where(state.step == 1, jnp.inf, table[3, 5])
        return loss, gradient | {"embed": {**gradient["embed"], "table": table.at[3, 5].set(bad)}}, completions

    monkeypatch.setattr(kto_jax.training.step, "loss_and_gradient", poisoned)
    good = make_schedule(96, 8)[1].batch(0)
    states, figures = steps_on_two_devices([good, good, good])
    assert [state.num_bad_steps for state in states] == [0, 0, 1, 0]
    assert np.isfinite(figures[1]["loss"]) and figures[1]["grad_norm"] == np.inf
    assert not moved((states[1].policy, states[1].opt_state), (states[2].policy, states[2].opt_state))
    assert moved(states[2].policy, states[3].policy)


def test_the_logged_learning_rate_is_the_applied_one_after_bad_steps_too():
    """The optimizer counts updates: after two bad steps it is still at the start of its warm-up."""
    mesh, _, optimizer, step = step_on_one_device("float32")
    policy, reference = jax.device_put(parameters("float32"), jax.devices()[0])
    state = create_state(policy, reference, optimizer, mesh, {})
    good = make_schedule(96, 8)[1].batch(0)
    bad = dataclasses.replace(good, weights=np.full_like(good.weights, np.nan))
    rates, moved = [], []
    for batch in (bad, bad, good, good):
        before = np.asarray(state.policy["embed"]["table"])
        state, figures = step(state, place_batch(mesh, batch))
        rates.append(float(figures["learning_rate"]))
        moved.append(float(np.max(np.abs(np.asarray(state.policy["embed"]["table"]) - before))))
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.2])
    assert moved[:2] == [0, 0]
    assert moved[2] == pytest.approx(rates[2], rel=1e-3)  # Adam's first update is the rate, whatever the gradient.


def test_only_on_cpu_do_sums_over_the_batch_wait_for_the_loops():
    tied = jax.jit(lambda earlier, tree: _run_after([earlier], tree)).trace(jnp.ones(3), {"a": jnp.ones(2, bool)})
    for platform, waits in (("cpu", True), ("tpu", False), ("cuda", False)):
        assert ("is_finite" in tied.lower(lowering_platforms=(platform,)).as_text()) == waits


def test_bfloat16_compute_trains_float32_weights_close_to_the_float32_step():
    _, after, figures, _, _ = one_step(dtype="bfloat16")
    assert after.policy["embed"]["table"].dtype == np.float32
    expected = plain_step()[2]
    assert figures["loss"] == pytest.approx(float(expected["loss"]), abs=0.02)
    assert figures["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=0.05)
    assert figures["loss"] != expected["loss"]


def test_a_batch_of_one_prompt_has_no_unmatched_pairs_and_a_z0_of_0():
    _, _, figures, _, _ = one_step(num_prompts=1)
    assert figures["z0"] == figures["kl"] == figures["num_unmatched"] == 0
    assert np.isfinite(figures["loss"])


def test_evaluation_gives_the_loss_that_training_saw():
    before, _, figures, model, batch = plain_step()
    evaluated, rewards, gains = jax.jit(functools.partial(evaluation_step, model, OBJECTIVE))(before, batch)
    assert evaluated["loss_sum"] / BATCH == pytest.approx(float(figures["loss"]), rel=1e-6)
    assert evaluated["z0"] == pytest.approx(float(figures["z0"]), rel=1e-6)
    good = np.asarray(batch.desirable & batch.matched.filled)
    assert np.mean(np.asarray(rewards)[good]) == pytest.approx(float(figures["rewards_desirable"]), rel=1e-5)
    point = OBJECTIVE.reference_reward(evaluated["z0"], {})
    np.testing.assert_allclose(np.asarray(gains)[good], np.asarray(rewards)[good] - point, rtol=1e-5)


def flops_of_a_forward_pass(config, rows):
    total = 0.0
    for segments, positions in zip(rows.segment_ids.reshape(-1, 96), rows.positions.reshape(-1, 96), strict=True):
        for position in positions[segments > 0]:
            total += config.flops_per_token(attended=position + 1, head=False)
    head = config.flops_per_token(0, head=True) - config.flops_per_token(0, head=False)
    return total + head * np.sum(rows.target_segments > 0)


def test_flops_of_a_step_are_four_forward_passes_over_matched_rows_and_two_over_unmatched_ones():
    _, _, figures, model, batch = plain_step()
    matched, unmatched = (flops_of_a_forward_pass(model.config, rows) for rows in (batch.matched, batch.unmatched))
    assert figures["flops"] == pytest.approx(4 * matched + 2 * unmatched, rel=1e-5)


def test_flops_of_local_layers_are_those_of_what_each_token_sees():
    config = dataclasses.replace(CONFIG, window=7, local_layers=(True, False))
    batch = make_schedule(96, 8)[1].batch(0)
    sft = make_objective(ObjectiveConfig(name="sft"), num_desirable=1, num_undesirable=1)
    expected = 3 * flops_of_a_forward_pass(config, batch.matched)
    assert float(tokens_and_flops(Model.create(config), sft, batch)["flops"]) == pytest.approx(expected, rel=1e-5)
    assert expected < 3 * flops_of_a_forward_pass(CONFIG, batch.matched)


@pytest.mark.parametrize("name, options, passes", [
    ("kto", {}, (4, 2)), ("kto", {"variant": "simple"}, (6, 0)), ("kto", {"variant": "reference_free"}, (3, 1)),
    ("bco", {}, (4, 0)), ("sft", {}, (3, 0)),
])  # fmt: skip
def test_flops_count_the_passes_that_each_objective_makes(name, options, passes):
    model, batch = Model.create(CONFIG), make_schedule(96, 8)[1].batch(0)
    bco, sft = (
        make_objective(ObjectiveConfig(name=name), num_desirable=1, num_undesirable=1) for name in ("bco", "sft")
    )
    with_reference, without = (float(tokens_and_flops(model, each, batch)["flops"]) for each in (bco, sft))
    matched = with_reference - without
    unmatched = (float(tokens_and_flops(model, OBJECTIVE, batch)["flops"]) - 4 * matched) / 2
    objective = make_objective(ObjectiveConfig(name=name, **options), num_desirable=1, num_undesirable=1)
    expected = passes[0] * matched + passes[1] * unmatched
    assert unmatched > 0.5 * matched
    assert float(tokens_and_flops(model, objective, batch)["flops"]) == pytest.approx(expected, rel=1e-5)


def test_the_error_of_a_rounded_reference_is_that_of_its_log_probabilities():
    mesh, model, _, _ = step_on_one_device("float32")
    policy = jax.device_put(parameters("float32")[0], jax.devices()[0])
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), policy)
    batch = place_batch(mesh, make_schedule(96, 8)[1].batch(0))

    @jax.jit
    def error(reference):
        return reference_error(model, OBJECTIVE, TrainState(0, policy, reference, (), {}, 0), batch)

    exact, found = jax.device_get((error(policy), error(rounded)))
    assert exact.pop("completions") == found["completions"] == BATCH
    assert exact == dict.fromkeys(("logps_mean", "logps_max", "rewards_mean", "rewards_max"), 0)
    assert 1e-5 < found["logps_mean"] < found["logps_max"] < 1
    for name in ("mean", "max"):
        assert found[f"rewards_{name}"] == pytest.approx(0.3 * found[f"logps_{name}"], rel=1e-4)


EXPERTS = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2, family="olmoe")
LOADS = {"router_loss", "router_balance", "router_z", "router_entropy", "expert_max_load", "dropped_tokens"}


@pytest.mark.parametrize("architecture, lora, router, more", [
    (EXPERTS, None, RouterWeights(0.5, 0.1), LOADS),
    (CONFIG, LoraConfig(rank=2, alpha=4.0, dropout=0.1), NO_ROUTERS, set()),
])  # fmt: skip
def test_a_step_leaves_the_shapes_and_dtypes_of_the_state_so_that_it_is_compiled_once(architecture, lora, router, more):
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    learning_rate = make_learning_rate(config, 3)
    optimizer = make_optimizer(config, learning_rate)

    def begin(key):
        reference = Model.create(architecture).init_params(key, "float32")
        policy = init_adapters(reference, lora, key) if lora else reference
        return TrainState(jnp.int32(0), policy, reference, optimizer.init(policy), {}, jnp.int32(0))

    recipe = Recipe(Model.create(architecture, lora=lora), OBJECTIVE, optimizer, learning_rate, router=router)
    before = jax.eval_shape(begin, jax.random.key(0))
    step = functools.partial(train_step, recipe)
    after, figures = jax.eval_shape(step, before, make_schedule(96, 8)[1].batch(0))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert LOADS & figures.keys() == more and all(figure.shape == () for figure in figures.values())
