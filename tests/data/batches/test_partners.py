"""Unrelated completions: never of the same prompt."""

import jax
import numpy as np
import pytest

from kto_jax.data.batches.partners import find_partners
from tests.data.batches.indices import fake_index, make_paired_schedule, make_schedule, paired_index, random_index


@pytest.mark.parametrize("size", [2, 3, 5, 8, 64])
@pytest.mark.parametrize("num_prompts", [1, 2, 3, 1000])
def test_no_row_is_paired_with_its_own_prompt(size, num_prompts):
    rng = np.random.default_rng(size)
    for _ in range(20):
        prompts = rng.integers(0, num_prompts, size)
        partners = find_partners(prompts)
        for i in range(size):
            following = [(i + k) % size for k in range(1, size) if prompts[(i + k) % size] != prompts[i]]
            assert partners[i] == (following[0] if following else -1)


def test_a_batch_of_one_or_of_one_prompt_has_no_partners():
    assert find_partners(np.array([7])).tolist() == [-1]
    assert find_partners(np.array([7, 7, 7])).tolist() == [-1, -1, -1]
    index = fake_index([(3, 4)] * 5, prompts=[0] * 5)
    schedule = make_schedule(index, batch_size=2)
    for step, size in ((0, 2), (2, 1)):
        batch = schedule.batch(step)
        assert schedule.step(step).partners.tolist() == [-1] * size
        assert (batch.num_matched, batch.num_unmatched) == (1, 0)
        assert batch.matched.filled.sum() == size and not batch.unmatched.filled.any()


def test_partners_are_row_ids_whose_prompt_differs():
    index = random_index(64, num_prompts=5)
    schedule = make_schedule(index, batch_size=16)
    for s in range(schedule.num_steps):
        step = schedule.step(s)
        assert set(step.partners) <= set(step.ids)
        assert (index.prompt_hashes[step.partners] != index.prompt_hashes[step.ids]).all()


def test_partners_of_pairs_never_share_the_prompt_and_keep_their_place_in_the_pair():
    index = paired_index(64, num_prompts=5)
    schedule = make_paired_schedule(index, batch_size=16)
    for s in range(schedule.num_steps):
        step = schedule.step(s)
        assert (index.prompt_hashes[step.partners] != index.prompt_hashes[step.ids]).all()
        assert (index.desirable[step.partners] == index.desirable[step.ids]).all()
        chosen, rejected = step.partners.reshape(-1, 2).T
        assert (rejected == chosen + 1).all()
    alone = make_paired_schedule(paired_index(5, num_prompts=1), batch_size=2)
    assert alone.step(0).partners.tolist() == [-1] * 4 and not alone.batch(0).unmatched.filled.any()


@pytest.mark.parametrize("paired", [False, True])
def test_without_unmatched_rows_no_partners_are_computed_or_packed(paired):
    index = paired_index(20)
    schedule = (make_paired_schedule if paired else make_schedule)(index, unmatched=False)
    batch, whole = schedule.batch(0, slice(1, 3)), schedule.batch(0)
    assert (schedule.step(0).partners == -1).all() and batch.num_unmatched == 0 and batch.num_matched > 0
    for name, array in vars(batch.unmatched).items():
        assert array.shape == (0, 2, getattr(whole.matched, name).shape[-1])
    with_partners = (make_paired_schedule if paired else make_schedule)(index).batch(0)
    same = jax.tree.map(np.array_equal, whole.matched, with_partners.matched)
    assert all(jax.tree.leaves(same)) and with_partners.num_unmatched > 0
