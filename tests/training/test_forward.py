"""Log-probabilities, rewards and values of packed rows, compared with the sequences themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import ObjectiveConfig
from kto_jax.losses import token_logps
from kto_jax.models.attention.dense import dense_attention
from kto_jax.models.config import TransformerConfig
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model
from kto_jax.objectives import make_objective
from kto_jax.shapes import LabelledRows
from kto_jax.training.forward import completion_states, packed_logps, packed_rewards, read_completions
from tests.losses.test_logprobs import equations
from tests.synthetic import make_index, make_schedule

CONFIG = TransformerConfig(
    vocab_size=98, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_head=True
)


def microbatch(row_length=80):
    """The index, and rows, labels and scores of one microbatch that holds all sequences."""
    index = make_index(16, paired=True)
    schedule = make_schedule(
        index, batch_size=16, row_length=row_length, microbatch_rows=16, max_length=38, shuffle=False
    )
    batch = schedule.batch(0)
    return index, *jax.tree.map(lambda x: jnp.asarray(x[0]), (batch.matched, batch.desirable, batch.scores))


@pytest.mark.parametrize("num_devices, num_chunks", [(1, 16), (4, 4), (16, 1)])
def test_chunks_of_logits_grow_with_the_devices_that_share_them(monkeypatch, num_devices, num_chunks):
    # One device fits the logits of 5 tokens of each row; there are 16 rows of 80.
    monkeypatch.setattr("kto_jax.losses.logprobs._MAX_LOGITS", 98 * 16 * 5)
    model = Model.create(CONFIG, layout=Layout(num_devices=num_devices, attention=dense_attention))
    rows = microbatch()[1]
    jaxpr = jax.make_jaxpr(lambda params: packed_logps(model, params, rows))(model.abstract_params("float32"))
    loops = [loop.params["length"] for loop in equations(jaxpr.jaxpr) if loop.primitive.name == "scan"]
    # The layers are the other loop.
    assert num_chunks == 1 or num_chunks in loops
    assert all(length in (num_chunks, CONFIG.num_layers, 1) for length in loops)


@pytest.mark.parametrize("row_length", [38, 80])
def test_a_reward_is_read_at_the_last_token_of_each_completion(row_length):
    model = Model.create(CONFIG, scalar_head="reward")
    params = model.init_params(jax.random.key(0), "float32")
    index, rows, _, _ = microbatch(row_length)
    got = jax.jit(packed_rewards, static_argnums=0)(model, params, rows)

    @jax.jit
    def scores(ids):
        positions = jnp.arange(ids.shape[1])[None]
        return model.apply_scalar_head(params, model.hidden_states(params, ids, jnp.ones_like(ids), positions))

    expected = []
    for row in range(16):
        sequence = np.concatenate([index.prompt(row), index.completion(row)])
        ids = np.pad(sequence, (0, 38 - len(sequence)))[None]
        expected.append(float(scores(ids)[0, len(sequence) - 1]))
    assert sorted(np.asarray(got)[rows.filled]) == pytest.approx(sorted(expected), abs=1e-5)
    assert not np.any(np.asarray(got)[~rows.filled])


def test_values_are_those_before_each_token_and_their_gradient_stops_at_the_hidden_states():
    model = Model.create(CONFIG, scalar_head="value")
    policy = model.init_params(jax.random.key(0), "float32")
    policy["scorer"]["last"]["weight"] += 0.1  # they start at 0
    reference = {name: leaf for name, leaf in policy.items() if name != "scorer"}
    objective = make_objective(ObjectiveConfig(name="ppo_offline"), num_desirable=1, num_undesirable=1)
    _, *rows = microbatch()

    @jax.jit
    def values(policy):
        return read_completions(model, objective, policy, reference, LabelledRows(*rows)).tokens.values

    scores = jax.jit(lambda policy: model.apply_scalar_head(policy, completion_states(model, policy, rows[0])))
    np.testing.assert_array_equal(values(policy), scores(policy))
    gradient = jax.grad(lambda policy: jnp.sum(jnp.square(values(policy))))(policy)
    assert jnp.any(gradient["scorer"]["first"]["weight"] != 0)
    for name in reference:
        assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient[name]))


def test_humanline_clamps_each_token_before_the_sum():
    model = Model.create(CONFIG)
    policy, reference = (
        jax.tree.map(lambda leaf: 4 * leaf, model.init_params(jax.random.key(seed), "float32")) for seed in (0, 1)
    )
    objective = make_objective(ObjectiveConfig(humanline=True), num_desirable=1, num_undesirable=1)
    _, rows, desirable, scores = microbatch()
    read = jax.jit(lambda *arrays: read_completions(model, objective, *arrays))
    seen = read(policy, reference, LabelledRows(rows, desirable, scores))
    logps = jax.jit(
        lambda params: token_logps(completion_states(model, params, rows), model.head(params), rows.targets)
    )
    by_token = [logps(params) for params in (policy, reference)]
    ratios = np.asarray(by_token[0] - by_token[1])
    assert (ratios < -1).any()
    assert (ratios > 1.5).any()
    for row, slot in np.argwhere(rows.filled):
        of_slot = rows.target_segments[row] == slot + 1
        clamped = np.clip(ratios[row], -1, 1.5)[of_slot].sum()
        assert seen.policy[row, slot] - seen.reference[row, slot] == pytest.approx(clamped, abs=1e-4)
        assert seen.likelihood[row, slot] == pytest.approx(float(by_token[0][row][of_slot].sum()), abs=1e-4)
