"""Sampled tokens read by the forward pass of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.model import Model
from kto_jax.rollouts.measure import measure, read_figures, write_figures
from kto_jax.sampling.sample import Sampling, sample_with_logps
from tests.sampling.test_sample import CONFIG, PROMPTS, tiny

EOS = 5


@pytest.fixture(scope="module")
def sampled():
    """Completions that ended, and some that were cut."""
    found = sample_with_logps(
        *tiny(), PROMPTS * 4, Sampling(max_new_tokens=12), eos_id=EOS, key=jax.random.key(1), batch_size=8
    )
    assert {int(each.ids[-1]) == EOS for each in found} == {True, False}
    return found


def read(model, params, sampled, **sizes):
    sizes = {"row_length": 64, "microbatch_rows": 4} | sizes
    return measure(model, params, [np.array(p) for p in PROMPTS * 4], [each.ids for each in sampled], **sizes)


def test_the_sampler_and_training_agree_to_1e_4_for_every_token(sampled):
    found = read(*tiny(), sampled)
    gaps = [np.abs(own.logps - logps) for own, logps in zip(sampled, found.logps, strict=True)]
    assert [len(gap) for gap in gaps] == [len(each.ids) for each in sampled]
    assert np.max(np.concatenate(gaps)) <= 1e-4
    assert all(not values.any() for values in found.values)


def test_packing_changes_figures_by_rounding_alone(sampled):
    first, second = read(*tiny(), sampled), read(*tiny(), sampled, row_length=128, microbatch_rows=2)
    np.testing.assert_allclose(np.concatenate(first.logps), np.concatenate(second.logps), atol=1e-5)


@pytest.mark.parametrize("tower", [False, True])
def test_a_value_head_is_read_before_each_token(sampled, tower):
    model = Model.create(CONFIG, scalar_head="value", value_tower=tower)
    params = model.init_params(jax.random.key(3), "float32")
    last = params[SCALAR_HEAD]["last"]
    params[SCALAR_HEAD]["last"] = {**last, "weight": last["weight"] + 0.5}
    if tower:
        params[SCALAR_HEAD][TOWER] = jax.tree.map(lambda leaf: leaf * 1.1, params[SCALAR_HEAD][TOWER])
    found = read(model, params, sampled)
    tokens = jnp.concatenate([jnp.asarray(PROMPTS[0]), jnp.asarray(sampled[0].ids)])[None]
    read_by_head = params[SCALAR_HEAD][TOWER] if tower else params
    hidden = model.hidden_states(read_by_head, tokens, jnp.ones_like(tokens), jnp.arange(tokens.size)[None])
    expected = model.apply_scalar_head(params, hidden)[0, len(PROMPTS[0]) - 1 : -1]
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_figures_are_kept(tmp_path):
    path = tmp_path / "round" / "tokens.npz"
    figures = {"old_logps": [np.float32([1, 2]), np.float32([3])], "values": [np.float32([4, 5]), np.float32([6])]}
    write_figures(path, figures)
    found = read_figures(path)
    assert found.keys() == figures.keys()
    for name, arrays in figures.items():
        for one, other in zip(arrays, found[name], strict=True):
            np.testing.assert_array_equal(one, other)
