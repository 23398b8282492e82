import itertools
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_jax.config import ConfigError
from kto_jax.data.batches.packing import RowShape, pack
from kto_jax.data.batches.partners import find_partners
from kto_jax.data.batches.prefetch import prefetch
from kto_jax.data.index.index import Index
from kto_jax.data.permutation import permute
from tests import synthetic

EOS, BOS = 2, 1


def fake_index(lengths, prompts=None, *, max_prompt_length=512, seed=0):
    """An index in memory: `lengths` are (prompt, completion) pairs, `prompts` say which rows share a prompt."""
    rng = np.random.default_rng(seed)
    num_prompt, num_completion = np.array(lengths).T
    offsets = np.concatenate([[0], np.cumsum(num_prompt + num_completion)])
    tokens = rng.integers(3, 500, offsets[-1]).astype(np.int32)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = BOS, EOS
    count = len(lengths)
    hashes = np.arange(count) if prompts is None else np.array(prompts)
    manifest = {"data": {"max_prompt_length": max_prompt_length}, "tokenizer": {"bos_id": BOS}}
    return Index(
        directory=Path(),
        manifest=manifest,
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=num_prompt.astype(np.int32),
        desirable=rng.random(count) < 0.5,
        weights=(1 + rng.random(count)).astype(np.float32),
        scores=rng.normal(size=count).astype(np.float32),
        rejected=np.full(count, -1, np.int64),
        prompt_hashes=hashes.astype(np.uint64),
        splits=np.zeros(count, np.uint8),
        places=np.zeros((count, 2), np.int64),
    )


def paired_index(num_pairs, *, num_prompts=None, lengths=(2, 15, 25), seed=0):
    """Rows 2k and 2k + 1 are the chosen and the rejected completion of one prompt."""
    rng = np.random.default_rng(seed)
    least, most_prompt, most_completion = lengths
    prompts = np.repeat(rng.integers(least, most_prompt, num_pairs), 2)
    completions = rng.integers(least, most_completion, 2 * num_pairs)
    hashes = np.repeat(rng.integers(0, num_prompts, num_pairs) if num_prompts else np.arange(num_pairs), 2)
    index = fake_index(np.stack([prompts, completions], axis=1).tolist(), hashes, seed=seed)
    index.rejected[::2] = np.arange(1, 2 * num_pairs, 2)
    index.desirable[:] = np.arange(2 * num_pairs) % 2 == 0
    return index


def random_index(count, *, num_prompts=None, seed=0):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, num_prompts, count) if num_prompts else None
    return fake_index(rng.integers((2, 2), (15, 25), (count, 2)).tolist(), prompts, seed=seed)


def make_schedule(index, **changes):
    settings = {"batch_size": 8, "seed": 0, "epochs": 2, "row_length": 64, "microbatch_rows": 4}
    settings |= {"completion_length": 48, "max_length": 48} | changes
    return synthetic.make_schedule(index, settings.pop("ids", None), **settings)


def unpack(packed, by_slot=None):
    """Every sequence of packed rows as (prompt ids, completion ids, value of its slot), read from the masks."""
    sequences = []
    for at in np.ndindex(packed.tokens.shape[:-1]):
        slots = packed.filled.shape[-1]
        for slot in range(slots):
            inside = packed.segment_ids[at] == slot + 1
            targets = packed.target_segments[at] == slot + 1
            assert packed.filled[at][slot] == inside.any() == targets.any()
            if not inside.any():
                continue
            ids = packed.tokens[at][inside]
            assert packed.positions[at][inside].tolist() == list(range(len(ids)))
            completion = packed.targets[at][targets]
            predictors = packed.predictors[at][targets]
            assert (np.diff(np.flatnonzero(inside)) == 1).all() and (np.diff(predictors) == 1).all()
            assert packed.tokens[at][predictors + 1].tolist() == completion.tolist() == ids[-len(completion) :].tolist()
            assert (packed.segment_ids[at][predictors] == slot + 1).all()
            value = None if by_slot is None else tuple(array[at][slot] for array in by_slot)
            sequences.append((ids[: -len(completion)].tolist(), completion.tolist(), value))
        assert (packed.tokens[at][packed.segment_ids[at] == 0] == 0).all()
    return sorted(sequences)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 9))
def test_the_order_of_an_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, (seed, epoch))) == list(range(size))


def test_the_order_looks_random_and_changes_with_seed_and_epoch():
    orders = [permute(np.arange(1000), 1000, key) for key in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.1
        assert (np.diff(order) == 1).sum() < 10
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10
    # Every position receives every value about equally often.
    first = [int(permute(np.array([0]), 8, (seed, 0))[0]) for seed in range(2000)]
    assert np.bincount(first, minlength=8).min() > 190


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


def test_prefetch_keeps_the_order_and_raises_what_the_function_raises():
    def function(step):
        time.sleep(0.01 * (step == 0))
        if step == 4:
            raise ValueError("step 4")
        return threading.current_thread().name, step

    results = prefetch(function, range(9))
    got = [next(results) for _ in range(4)]
    assert [step for _, step in got] == [0, 1, 2, 3] and all(name.startswith("prefetch") for name, _ in got)
    with pytest.raises(ValueError, match="step 4"):
        next(results)


def test_prefetch_works_ahead_by_its_depth_and_stops_when_closed():
    made = []
    results = prefetch(made.append, range(100), depth=3)
    next(results)
    time.sleep(0.05)
    assert len(made) == 3
    results.close()
    time.sleep(0.05)
    assert len(made) == 3 and not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_real_index_is_planned_and_packed(make_index, tokenizer):
    rows = [
        {"prompt": f"Question {i // 2}?", "completion": "Text. " * (i % 5 + 1), "label": i % 2 == 0} for i in range(20)
    ]
    index = make_index(rows, max_length=64)
    schedule = make_schedule(index, max_length=64, completion_length=64, epochs=1)
    completions = [c for s in range(schedule.num_steps) for _, c, _ in unpack(schedule.batch(s).matched)]
    assert sorted(completions) == sorted(index.completion(i).tolist() for i in range(20))
    assert all(c[-1] == tokenizer.eos_id and c.count(tokenizer.eos_id) == 1 for c in completions)


def make_paired_schedule(index, **changes):
    settings = {"row_length": 128, "completion_length": 96, "paired": True, "ids": index.pairs("train")}
    return make_schedule(index, **settings | changes)


def pairs_of(packed):
    """The (prompt ids, completion ids) of slots 2k and 2k + 1 of every row, None for an empty slot."""
    found = []
    for at in np.ndindex(packed.tokens.shape[:-1]):
        for slot in range(0, packed.filled.shape[-1], 2):
            pair = []
            for member in (slot + 1, slot + 2):
                ids = packed.tokens[at][packed.segment_ids[at] == member].tolist()
                completion = packed.targets[at][packed.target_segments[at] == member].tolist()
                pair.append((ids[: len(ids) - len(completion)], completion) if ids else None)
            if pair != [None, None]:
                found.append(tuple(pair))
    return sorted(found)


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


def test_every_slot_has_the_score_of_its_example_and_empty_slots_have_none():
    index = random_index(33)
    batch = make_schedule(index, batch_size=33).batch(0)
    expected = sorted((index.prompt(i).tolist(), index.completion(i).tolist(), (index.scores[i],)) for i in range(33))
    assert unpack(batch.matched, (batch.scores,)) == expected
    assert batch.scores.dtype == np.float32 and not batch.scores[~batch.matched.filled].any()


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


CONTROLS = (np.array([501, 502, 503]), np.array([504]))


def test_a_control_ends_the_prompt_by_the_label_of_its_completion():
    index = random_index(33)
    schedule = make_schedule(index, batch_size=33, unmatched=False, controls=CONTROLS)
    expected = sorted(
        (index.prompt(i).tolist() + CONTROLS[int(index.desirable[i])].tolist(), index.completion(i).tolist(), None)
        for i in range(33)
    )
    batch = schedule.batch(0)
    assert unpack(batch.matched) == expected and batch.matched.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("lengths", "max_length", "max_prompt_length", "kept"),
    [
        ((10, 4), 12, 11, 5),  # 12 - 4 - 3 of the control
        ((10, 4), 12, 6, 3),  # 6 - 3 of the control
        ((10, 4), 12, 2, 1),  # the control is longer than max_prompt_length, and stays
        ((10, 8), 12, 6, 1),
        ((5, 4), 12, 2, 5),  # all fits together
    ],
)
def test_a_control_is_never_cut_but_the_prompt_before_it_is_from_the_left(lengths, max_length, max_prompt_length, kept):
    index = fake_index([lengths], max_prompt_length=max_prompt_length)
    index.desirable[0] = False
    limits = {"row_length": 16, "completion_length": 16, "max_length": max_length}
    schedule = make_schedule(index, batch_size=2, unmatched=False, controls=CONTROLS, **limits)
    ((prompt, completion, _),) = unpack(schedule.batch(0).matched)
    original = index.prompt(0).tolist()
    expected = [BOS, *original[len(original) - kept + 1 :]] if kept > 1 else original[-1:]
    assert prompt == [*expected, 501, 502, 503] and completion == index.completion(0).tolist()


def test_a_control_that_leaves_no_token_of_the_prompt_is_refused():
    index = fake_index([(10, 8)])
    limits = {"row_length": 16, "completion_length": 16, "unmatched": False, "controls": CONTROLS}
    index.desirable[0] = False
    make_schedule(index, max_length=12, **limits)
    with pytest.raises(
        ConfigError, match=r"have 11 tokens, which leaves no prompt within data.max_length=11\. .*Raise"
    ):
        make_schedule(index, max_length=11, **limits)
    index.desirable[0] = True
    make_schedule(index, max_length=11, **limits)


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
