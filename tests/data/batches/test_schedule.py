"""The sequences of a step and the shape of its batch."""

import jax
import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.data.index.index import Index
from tests.data.batches.indices import BOS, fake_index, make_schedule, paired_index, random_index, unpack


def test_each_epoch_visits_each_row_exactly_once_and_the_last_partial_batch_too():
    index = random_index(53)
    rows = np.arange(0, 53, 2)
    schedule = make_schedule(index, ids=rows, epochs=3)
    assert (schedule.steps_per_epoch, schedule.num_steps) == (4, 12)
    steps = [schedule.step(s) for s in range(12)]
    assert [len(step.ids) for step in steps] == [8, 8, 8, 3] * 3
    epochs = [np.concatenate([s.ids for s in steps if s.epoch == e]) for e in range(3)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_without_shuffling_rows_come_in_the_order_given():
    schedule = make_schedule(random_index(10), ids=np.array([5, 3, 9, 1]), batch_size=3, shuffle=False)
    assert [schedule.step(s).ids.tolist() for s in range(2)] == [[5, 3, 9], [1]]


def test_a_step_is_a_pure_function_of_seed_and_step():
    index = random_index(40, num_prompts=9)
    forwards, backwards = make_schedule(index), make_schedule(index)
    later = {s: backwards.batch(s) for s in reversed(range(backwards.num_steps))}
    for s in range(forwards.num_steps):
        same = jax.tree.map(np.array_equal, forwards.batch(s), later[s])
        assert all(jax.tree.leaves(same))
    other = make_schedule(index, seed=1)
    assert not np.array_equal(forwards.step(0).ids, other.step(0).ids)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
def test_unpacking_gives_back_exactly_the_sequences_with_their_labels(batch_size):
    index = random_index(33, num_prompts=6)
    schedule = make_schedule(index, batch_size=batch_size)
    for s in range(schedule.steps_per_epoch):
        step, batch = schedule.step(s), schedule.batch(s)
        expected = sorted(
            (index.prompt(i).tolist(), index.completion(i).tolist(), (index.desirable[i], index.weights[i]))
            for i in step.ids
        )
        assert unpack(batch.matched, (batch.desirable, batch.weights)) == expected
        pairs = [(i, j) for i, j in zip(step.ids, step.partners, strict=True) if j >= 0]
        expected = sorted((index.prompt(i).tolist(), index.completion(j).tolist(), None) for i, j in pairs)
        assert unpack(batch.unmatched) == expected
        assert not batch.weights[~batch.matched.filled].any() and not batch.desirable[~batch.matched.filled].any()


def test_an_unrelated_completion_that_does_not_fit_cuts_the_prompt_from_the_left():
    index = fake_index([(10, 2), (3, 14)], max_prompt_length=8)
    schedule = make_schedule(index, batch_size=2, row_length=16, max_length=16, completion_length=16, shuffle=False)
    prompt = index.prompt(0)
    unmatched = {len(completion): ids for ids, completion, _ in unpack(schedule.batch(0).unmatched)}
    assert unmatched[14] == [BOS, prompt[-1]] and unmatched[2] == index.prompt(1).tolist()
    matched = {len(completion): ids for ids, completion, _ in unpack(schedule.batch(0).matched)}
    assert matched[2] == prompt.tolist() and matched[14] == [BOS, index.prompt(1)[-1]]


def test_a_shorter_max_length_than_the_indexs_cuts_completions_too():
    index = fake_index([(4, 20), (3, 5)])
    schedule = make_schedule(index, batch_size=2, max_length=8, shuffle=False)
    found = sorted((prompt, completion) for prompt, completion, _ in unpack(schedule.batch(0).matched))
    long = ([int(index.prompt(0)[-1])], index.completion(0)[:7].tolist())
    assert found == sorted([long, (index.prompt(1).tolist(), index.completion(1).tolist())])


def test_all_microbatches_but_the_last_are_full_and_the_count_excludes_empty_ones():
    index = random_index(64)
    batch = make_schedule(index, batch_size=64).batch(0)
    for packed, count in ((batch.matched, batch.num_matched), (batch.unmatched, batch.num_unmatched)):
        used = packed.filled.any(axis=-1)
        assert count.dtype == np.int32 and count > 2
        assert used[: count - 1].all() and used[count - 1].any() and not used[count:].any()
        assert (packed.segment_ids > 0).mean(axis=(1, 2))[: count - 1].min() > 0.9
        assert packed.tokens.shape[0] & (packed.tokens.shape[0] - 1) == 0


def test_nearly_all_steps_have_one_shape():
    index = random_index(2000)
    schedule = make_schedule(index, batch_size=32, epochs=1)
    shapes = [schedule.batch(s).matched.tokens.shape for s in range(schedule.num_steps)]
    assert len(set(shapes)) <= 2 and shapes.count(max(set(shapes), key=shapes.count)) >= 0.95 * len(shapes)
    counts = [int(schedule.batch(s).num_matched) for s in range(0, schedule.num_steps, 8)]
    assert 2 * max(counts) >= shapes[0][0] / 2


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_the_hosts_slices_concatenate_to_the_whole(num_hosts):
    index = random_index(40, num_prompts=9)
    schedule = make_schedule(index, batch_size=32)
    whole = schedule.batch(0)
    size = 4 // num_hosts
    parts = [schedule.batch(0, slice(h * size, (h + 1) * size)) for h in range(num_hosts)]
    joined = jax.tree.map(lambda *p: p[0] if np.ndim(p[0]) == 0 else np.concatenate(p, axis=1), *parts)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, joined)))


def test_a_host_reads_only_the_rows_of_its_slice(monkeypatch):
    index = random_index(40)
    read = []
    completion = Index.completion
    monkeypatch.setattr(Index, "completion", lambda self, row: (read.append(row), completion(self, row))[1])
    batch = make_schedule(index, batch_size=32).batch(0, slice(0, 1))
    assert len(read) == batch.matched.filled.sum() + batch.unmatched.filled.sum() < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 65}, "max_length=65 does not fit a row of row_length=64"),
        ({"completion_length": 3}, "the longest completion has 4 tokens"),
        ({"ids": np.zeros(0, np.int64)}, "the split is empty"),
    ],
)
def test_a_schedule_whose_rows_do_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(fake_index([(3, 4)] * 5), **changes)


def test_a_real_index_is_planned_and_packed(make_index, tokenizer):
    rows = [
        {"prompt": f"Question {i // 2}?", "completion": "Text. " * (i % 5 + 1), "label": i % 2 == 0} for i in range(20)
    ]
    index = make_index(rows, max_length=64)
    schedule = make_schedule(index, max_length=64, completion_length=64, epochs=1)
    completions = [c for s in range(schedule.num_steps) for _, c, _ in unpack(schedule.batch(s).matched)]
    assert sorted(completions) == sorted(index.completion(i).tolist() for i in range(20))
    assert all(c[-1] == tokenizer.eos_id and c.count(tokenizer.eos_id) == 1 for c in completions)


def test_every_slot_has_the_score_of_its_example_and_empty_slots_have_none():
    index = random_index(33)
    batch = make_schedule(index, batch_size=33).batch(0)
    expected = sorted((index.prompt(i).tolist(), index.completion(i).tolist(), (index.scores[i],)) for i in range(33))
    assert unpack(batch.matched, (batch.scores,)) == expected
    assert batch.scores.dtype == np.float32 and not batch.scores[~batch.matched.filled].any()


@pytest.mark.parametrize("paired", [False, True])
def test_a_short_last_step_has_the_shape_of_the_others_where_slots_run_out_first(paired):
    index = paired_index(61, lengths=(2, 3, 3))
    rows = index.pairs("train") if paired else np.arange(121)
    size = {"batch_size": 60 if paired else 120, "microbatch_rows": 1, "row_length": 1024, "completion_length": 1024}
    schedule = make_schedule(index, paired=paired, ids=rows, **size)
    assert schedule.num_slots == 64 and [len(schedule.step(s).ids) for s in range(2)] == (
        [120, 2] if paired else [120, 1]
    )
    assert [schedule.batch(s).matched.tokens.shape for s in range(2)] == [(2, 1, 1024)] * 2


def test_schedules_with_slots_for_any_sequence_have_one_shape():
    short, long = fake_index([(2, 3)] * 16), fake_index([(20, 20)] * 16)
    for slots_for_any, slots in ((False, {16, 2}), (True, {16})):
        schedules = [make_schedule(index, batch_size=16, slots_for_any=slots_for_any) for index in (short, long)]
        assert {schedule.num_slots for schedule in schedules} == slots
