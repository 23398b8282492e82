"""Any number of hosts read the same rows in the same order, and together the whole batch."""

import jax
import numpy as np
import pytest

from tests.data.batches.indices import make_paired_schedule, make_schedule, paired_index, random_index


def plan_of(paired, seed=3, **changes):
    """A host's schedule, from its own index."""
    if paired:
        return make_paired_schedule(paired_index(23, num_prompts=6), seed=seed, batch_size=8, **changes)
    return make_schedule(random_index(45, num_prompts=9), seed=seed, batch_size=16, **changes)


@pytest.mark.parametrize("row_length", [128, (128, 144)])
@pytest.mark.parametrize("num_hosts", [1, 2, 4])
@pytest.mark.parametrize("paired", [False, True], ids=["thumbs", "pairs"])
def test_hosts_read_the_same_rows_and_their_slices_are_the_whole_batch(paired, num_hosts, row_length):
    one = plan_of(paired, row_length=row_length)
    hosts = [plan_of(paired, row_length=row_length) for _ in range(num_hosts)]
    assert one.num_steps == 2 * one.steps_per_epoch > 4
    for step in range(one.num_steps):
        expected, whole = one.step(step), one.batch(step)
        for host in hosts:
            schedule = host.step(step)
            assert schedule.epoch == expected.epoch == step // one.steps_per_epoch
            assert schedule.ids.tolist() == expected.ids.tolist()
            assert schedule.partners.tolist() == expected.partners.tolist()
        size = 4 // num_hosts
        parts = [host.batch(step, slice(h * size, (h + 1) * size)) for h, host in enumerate(hosts)]
        for part in parts:
            assert (part.num_matched, part.num_unmatched) == (whole.num_matched, whole.num_unmatched)
            assert part.matched.tokens.shape[:2] == (whole.matched.tokens.shape[0], size)
        joined = jax.tree.map(lambda *p: p[0] if np.ndim(p[0]) == 0 else np.concatenate(p, axis=1), *parts)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, joined)))


@pytest.mark.parametrize("paired", [False, True], ids=["thumbs", "pairs"])
def test_two_epochs_visit_every_row_twice_and_in_another_order(paired):
    schedule = plan_of(paired, row_length=128)
    rows = [
        np.concatenate([schedule.step(s).ids for s in range(schedule.num_steps) if schedule.step(s).epoch == e])
        for e in (0, 1)
    ]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(46 if paired else 45))
    assert rows[0].tolist() != rows[1].tolist()
    other = plan_of(paired, seed=4, row_length=128)
    assert other.step(0).ids.tolist() != schedule.step(0).ids.tolist()
