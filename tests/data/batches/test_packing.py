"""Padding in packed rows, and the choice of row lengths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_jax.data.batches.packing import RowShape, choose_row_lengths, pack
from tests.data.batches.indices import fake_index, make_schedule, random_index, unpack


def log_normal(count, *, seed=0):
    """Lengths with median 250, 95th percentile 1,000 and cap 2,048."""
    draws = np.random.default_rng(seed).standard_normal(count)
    return np.minimum(np.exp(math.log(250) + math.log(4) / 1.645 * draws).astype(int) + 2, 2048)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), max_size=50), st.integers(1, 6))
def test_every_sequence_is_in_the_row_where_it_leaves_the_least_room(lengths, slots):
    num_prompt, num_completion = np.array(lengths, np.int64).reshape(-1, 2).T
    total = num_prompt + num_completion
    packing = pack(num_prompt, num_completion, RowShape(length=32, completion_length=14, slots=slots))
    rows = []  # (tokens, completion tokens, slots) in use, by an independent and slow best fit
    for i in np.argsort(-total, kind="stable"):
        fits = [
            r for r, (t, c, s) in enumerate(rows) if t + total[i] <= 32 and c + num_completion[i] <= 14 and s < slots
        ]
        if not fits:
            rows.append((0, 0, 0))
        row = max(fits, key=lambda r: (rows[r][0], -r)) if fits else len(rows) - 1
        assert rows[packing.rows[i]][0] == rows[row][0] if fits else packing.rows[i] == row
        tokens, completions, used = rows[packing.rows[i]]
        assert (packing.starts[i], packing.completion_starts[i], packing.slots[i]) == (tokens, completions, used)
        rows[packing.rows[i]] = (tokens + total[i], completions + num_completion[i], used + 1)
    assert packing.num_rows == len(rows)


def test_packing_log_normal_lengths_needs_few_more_rows_than_their_tokens_fill():
    shape, lengths = RowShape(2048, 2048, 64), log_normal(256 * 20).reshape(20, 256)
    rows = [pack(batch - 1, np.ones_like(batch), shape).num_rows for batch in lengths]
    assert sum(rows) <= sum(math.ceil(batch.sum() / 2048) for batch in lengths) + 4
    assert 1 - lengths.sum() / (2048 * sum(rows)) < 0.02


def choose(totals, **settings):
    return choose_row_lengths(totals - 1, np.ones_like(totals), **settings)


def padding(schedule, num_steps):
    """Share of padding in non-empty microbatches, matched and unmatched."""
    real = room = 0
    for s in range(num_steps):
        batch = schedule.batch(s)
        for packed, count in ((batch.matched, batch.num_matched), (batch.unmatched, batch.num_unmatched)):
            real += int((packed.segment_ids > 0).sum())
            room += packed.segment_ids[:count].size
    return 1 - real / room


def test_two_row_lengths_leave_under_8_percent_padding_where_one_cannot():
    totals = log_normal(2000)
    index = fake_index(np.stack([totals - totals // 3, totals // 3], axis=1).tolist(), max_prompt_length=2000)
    lengths = choose_row_lengths(totals - totals // 3, totals // 3, batch_size=32, shortest=2048, num_lengths=2)
    assert len(lengths) == 2 and lengths[0] >= 2048
    shape = {"batch_size": 32, "microbatch_rows": 1, "completion_length": lengths[0], "max_length": 2048}
    one, two = (padding(make_schedule(index, row_length=length, **shape), 60) for length in (2048, lengths))
    assert two < 0.08 < one


def test_each_step_uses_the_row_length_with_the_fewest_tokens():
    index = random_index(300)
    settings = {"batch_size": 8, "microbatch_rows": 1, "completion_length": 40}
    schedule = make_schedule(index, row_length=(72, 64, 96), **settings)
    alone = {
        n: make_schedule(index, row_length=n, **settings | {"completion_length": 40 * n // 64}) for n in (64, 72, 96)
    }
    taken = set()
    for s in range(schedule.steps_per_epoch):
        batch = schedule.batch(s)
        costs = {}
        for length, other in alone.items():
            packed = other.batch(s)
            costs[length] = (2 * int(packed.num_matched) + int(packed.num_unmatched)) * length
        length = batch.matched.tokens.shape[-1]
        assert costs[length] == min(costs.values()) and batch.unmatched.tokens.shape[-1] == length
        assert batch.matched.targets.shape[-1] == 40 * length // 64
        assert unpack(batch.matched) == unpack(alone[length].batch(s).matched)
        taken.add(batch.matched.tokens.shape)
    # One number of microbatches, so one shape for each length.
    assert len(taken) == len({shape[-1] for shape in taken}) > 1


def test_the_shortest_row_length_that_serves_is_chosen():
    # Every batch fills four rows of 64 exactly.
    assert choose(np.full(100, 32), batch_size=8, shortest=64) == (64,)
    # Three sequences of 30 fill a row of 96 best; 64 would hold two and keep 4.
    assert choose(np.full(100, 30), batch_size=9, shortest=64) == (96,)
    # A second length would gain nothing and cost a compilation.
    assert choose(np.full(100, 32), batch_size=8, shortest=64, num_lengths=3) == (64,)


def test_a_length_is_chosen_for_the_microbatches_that_the_devices_need():
    # Rows of 80 hold two sequences of 40. Eight rows of 64 hold all eight, in the one microbatch that is needed anyway.
    totals = np.full(100, 40)
    assert choose(totals, batch_size=8, shortest=64, microbatch_rows=1) == (80,)
    assert choose(totals, batch_size=8, shortest=64, microbatch_rows=8) == (64,)
    assert choose(totals, batch_size=9, shortest=64, microbatch_rows=8) == (80,)


def test_a_second_length_must_save_1_percent():
    totals = log_normal(20000)
    sizes = [len(choose(totals, batch_size=n, shortest=2048, num_lengths=2)) for n in (32, 256)]
    assert sizes == [2, 1]


@pytest.mark.parametrize(("count", "length"), [(1, 64), (5, 112)])
def test_a_set_smaller_than_a_batch_is_one_batch(count, length):
    assert choose(np.full(count, 20), batch_size=32, shortest=64) == (length,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), max_size=60), st.integers(1, 6))
def test_packing_respects_the_three_capacities(lengths, slots):
    num_prompt, num_completion = np.array(lengths, np.int64).reshape(-1, 2).T
    shape = RowShape(length=32, completion_length=14, slots=slots)
    packing = pack(num_prompt, num_completion, shape)
    for row in range(packing.num_rows):
        inside = packing.rows == row
        assert (num_prompt + num_completion)[inside].sum() <= 32 and num_completion[inside].sum() <= 14
        assert sorted(packing.slots[inside]) == list(range(inside.sum())) and 1 <= inside.sum() <= slots
    assert packing.num_rows <= len(lengths) and (len(lengths) == 0 or packing.rows.max() + 1 == packing.num_rows)
