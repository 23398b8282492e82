"""Schedules of pairs: two completions of a prompt in adjacent slots."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_jax.config import ConfigError
from tests import synthetic
from tests.data.batches.indices import BOS, fake_index, make_paired_schedule, paired_index, pairs_of, unpack


@pytest.mark.parametrize("microbatch_rows", [1, 3])
@settings(max_examples=25, deadline=None)
@given(num_pairs=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 99))
def test_the_completions_of_a_pair_are_in_adjacent_slots_of_one_row(microbatch_rows, num_pairs, batch_size, seed):
    index = paired_index(num_pairs, num_prompts=5, lengths=(2, 20, 28), seed=seed)
    shape = {"batch_size": batch_size, "microbatch_rows": microbatch_rows, "row_length": 96, "completion_length": 60}
    schedule = make_paired_schedule(index, seed=seed, **shape)
    assert schedule.num_slots % 2 == 0
    for s in range(schedule.steps_per_epoch):
        step, batch = schedule.step(s), schedule.batch(s)
        text = [(index.prompt(i).tolist(), index.completion(i).tolist()) for i in step.ids]
        assert pairs_of(batch.matched) == sorted(zip(text[::2], text[1::2], strict=True))
        expected = sorted((*t, (index.desirable[i],)) for t, i in zip(text, step.ids, strict=True))
        assert unpack(batch.matched, (batch.desirable,)) == expected
        unrelated = [
            (index.prompt(i).tolist(), index.completion(j).tolist())
            for i, j in zip(step.ids, step.partners, strict=True)
            if j >= 0
        ]
        assert pairs_of(batch.unmatched) == sorted(zip(unrelated[::2], unrelated[1::2], strict=True))


def test_a_step_of_pairs_lists_chosen_then_rejected_and_an_epoch_visits_every_pair_once():
    index = paired_index(53)
    schedule = make_paired_schedule(index, epochs=3)
    assert (schedule.steps_per_epoch, schedule.num_steps) == (7, 21)
    steps = [schedule.step(s) for s in range(7)]
    assert [len(step.ids) for step in steps] == [16] * 6 + [10]
    rows = np.concatenate([step.ids for step in steps]).reshape(-1, 2)
    assert sorted(rows[:, 0]) == list(range(0, 106, 2)) and (rows[:, 1] == rows[:, 0] + 1).all()


def test_both_completions_of_a_pair_are_cut_to_the_same_prompt():
    index = fake_index([(10, 3), (10, 13), (4, 3), (4, 5)], prompts=[0, 0, 1, 1])
    for column in (index.prompt(0), index.prompt(2)):
        column[1:] = np.arange(len(column) - 1) + 100
    index.prompt(1)[:], index.prompt(3)[:] = index.prompt(0), index.prompt(2)
    index.rejected[::2] = [1, 3]
    schedule = make_paired_schedule(index, max_length=16, row_length=32, batch_size=2, shuffle=False)
    batch = schedule.batch(0)
    (short, long), (one, other) = sorted(pairs_of(batch.matched), key=lambda pair: len(pair[1][1]), reverse=True)
    assert short[0] == long[0] == [BOS, 107, 108] and one[0] == other[0] == [BOS, 100, 101, 102]
    assert [len(completion) for _, completion in (short, long, one, other)] == [3, 13, 3, 5]
    unrelated = sorted((prompt, len(completion)) for pair in pairs_of(batch.unmatched) for prompt, completion in pair)
    whole, cut = index.prompt(0).tolist(), [BOS, 101, 102]
    assert unrelated == [(whole, 3), (whole, 5), (cut, 3), (cut, 13)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"row_length": 95},
            r"pair of data.max_length=48 does not fit .*row_length=95 .*96 tokens\. Set config.row_len",
        ),
        ({"completion_length": 7}, "the longest pair's completions have 8 tokens, and a row has room for 7"),
        ({"ids": np.arange(10)}, r"5 of 10 sequences have no rejected completion\. .*Pass index.pairs"),
        ({"ids": np.zeros(0, np.int64)}, "the split is empty"),
    ],
)
def test_a_schedule_whose_pairs_do_not_fit_is_refused(changes, message):
    index = fake_index([(3, 4)] * 10)
    index.rejected[::2] = np.arange(1, 10, 2)
    make_paired_schedule(index, row_length=96, completion_length=8)
    with pytest.raises(ConfigError, match=message):
        make_paired_schedule(index, **changes)


def test_nearly_all_steps_of_pairs_have_one_shape():
    schedule = make_paired_schedule(paired_index(1500), batch_size=32, epochs=1)
    shapes = [schedule.batch(s).matched.tokens.shape for s in range(schedule.num_steps)]
    assert len(set(shapes)) <= 2 and shapes.count(max(set(shapes), key=shapes.count)) >= 0.95 * len(shapes)


def test_a_synthetic_index_of_pairs_shares_prompts_and_weights():
    index = synthetic.make_index(12, paired=True)
    assert index.pairs("train").tolist() == [0, 2, 4, 6, 8, 10]
    for row in index.pairs("train"):
        other = index.rejected[row]
        assert index.prompt(row).tolist() == index.prompt(other).tolist() and other == row + 1
        assert index.prompt_hashes[row] == index.prompt_hashes[other] and index.weights[row] == index.weights[other]
        assert index.desirable[row] and not index.desirable[other] and min(index.completion_lengths) > 0
    assert len(np.unique(index.prompt_hashes)) == 6


def test_a_pairs_weight_is_the_geometric_mean_of_its_rows():
    index = synthetic.make_index(16, paired=True)
    index.weights[:] = np.tile([1.0, 4.0, 2.0, 0.0], 4)
    schedule = synthetic.make_schedule(
        index, np.arange(0, 16, 2), batch_size=8, row_length=76, microbatch_rows=8, max_length=38, paired=True
    )
    batch = schedule.batch(0)
    weights = batch.weights[batch.matched.filled]
    assert sorted(weights.tolist()) == [0.0] * 8 + [2.0] * 8
