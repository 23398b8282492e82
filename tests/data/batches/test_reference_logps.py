"""The store of reference log-probabilities, and how a schedule writes them to the slots of a batch."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from kto_jax.data.batches.reference_logps import open_store
from tests import synthetic
from tests.synthetic import make_index


def named(index):
    """The index with a digest of its content."""
    return dataclasses.replace(index, manifest=index.manifest | {"content_sha256": "none"})


def make_schedule(index, *, paired=False, unmatched=True, batch_size=10, **options):
    rows = np.arange(0, len(index.splits), 2 if paired else 1)
    shape = {"row_length": 80, "microbatch_rows": 2, "completion_length": 64, "max_length": 38} | options
    order = {"batch_size": batch_size, "seed": 3, "epochs": 2}
    return synthetic.make_schedule(index, rows, paired=paired, unmatched=unmatched, **order, **shape)


def number(prompts, completions):
    """A number that identifies the pair."""
    return (-(1000.0 * prompts + completions + 1)).astype(np.float32)


def fill(store, schedule):
    for step in range(schedule.num_steps):
        rows, partners = schedule.step(step).ids, schedule.step(step).partners
        store.write(step, rows, number(rows, rows), np.where(partners < 0, 0, number(rows, partners)))


@pytest.mark.parametrize("paired, unmatched", [(False, True), (False, False), (True, True)])
def test_every_slot_holds_the_number_of_its_own_sequence(tmp_path, paired, unmatched):
    index = make_index(64, num_prompts=40, paired=paired)
    schedule = make_schedule(index, paired=paired, unmatched=unmatched)
    store = open_store(tmp_path / "store", 64, schedule.num_steps, schedule.max_sequences)
    fill(store, schedule)
    filled = schedule.with_reference_logps(store)
    for step in range(schedule.num_steps):
        batch, rows, partners = filled.batch(step), schedule.step(step).ids, schedule.step(step).partners
        assert np.all(batch.matched_reference[~batch.matched.filled] == 0)
        np.testing.assert_array_equal(
            np.sort(batch.matched_reference[batch.matched.filled]), np.sort(number(rows, rows))
        )
        matched, unrelated = schedule.by_sequence(step, batch.matched_reference, batch.unmatched_reference)
        np.testing.assert_array_equal(matched, number(rows, rows))
        wanted = np.where(partners < 0, 0, number(rows, partners)) if unmatched else np.zeros(len(rows))
        np.testing.assert_array_equal(unrelated, wanted)


def test_a_slot_of_the_batch_and_its_number_belong_to_the_same_tokens(tmp_path):
    index = make_index(64)
    schedule = make_schedule(index)
    store = open_store(tmp_path / "store", 64, schedule.num_steps, schedule.max_sequences)
    fill(store, schedule)
    batch = schedule.with_reference_logps(store).batch(4)
    by_number = {float(number(np.int64(row), np.int64(row))): row for row in schedule.step(4).ids}
    for m, r, s in np.argwhere(batch.matched.filled):
        row = by_number[float(batch.matched_reference[m, r, s])]
        targets = batch.matched.targets[m, r][batch.matched.target_segments[m, r] == s + 1]
        np.testing.assert_array_equal(targets, index.completion(row))


def test_hosts_get_the_numbers_of_their_own_rows(tmp_path):
    schedule = make_schedule(make_index(64))
    store = open_store(tmp_path / "store", 64, schedule.num_steps, schedule.max_sequences)
    fill(store, schedule)
    filled = schedule.with_reference_logps(store)
    whole, parts = filled.batch(1), [filled.batch(1, slice(i, i + 1)) for i in range(2)]
    for name in ("matched_reference", "unmatched_reference"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_steps_are_missing_until_they_are_written(tmp_path):
    store = open_store(tmp_path / "store", 8, 4, 3)
    assert store.is_missing(4).tolist() == [True] * 4
    store.write(1, np.array([5, 2]), np.float32([-1, -2]), np.float32([-3, 0]))
    assert store.is_missing(4).tolist() == [True, False, True, True]
    assert store.is_missing(2).tolist() == [True, False]
    store.unmatched_bits[2, 1] = store.unmatched_bits[1, 0]  # an interrupted step
    again = open_store(tmp_path / "store", 8, 4, 3)
    assert again.is_missing(4).tolist() == [True, False, True, True]
    assert again.matched[[5, 2]].tolist() == [-1, -2]
    assert again.unmatched[1].tolist() == [-3, 0, 0]


def test_pickling_a_store_transfers_only_its_path(tmp_path):
    store = open_store(tmp_path / "store", 1000, 4, 3)
    store.write(2, np.array([7]), np.float32([-1]), np.float32([-5]))
    packed = pickle.dumps(store)
    assert len(packed) < 400
    assert pickle.loads(packed).unmatched[2, 0] == -5


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


DAMAGES = {
    "a number": ("matched", lambda path: flip(path, 8 * 130 + 7), "1 of the 8 numbers in .*matched.npy have changed"),
    "a complement": ("unmatched", lambda path: flip(path, 8 * 134), "1 of the 12 numbers in .*unmatched.npy have cha"),
    "no array": ("matched", lambda path: path.write_bytes(b"\x93NUMPY no"), r"matched.npy is not an array of \(8,\)"),
    "an empty file": ("unmatched", lambda path: path.write_bytes(b""), r"unmatched.npy is not an array of \(4, 3\)"),
    "another shape": ("matched", lambda path: np.save(path, [1.0]), r"matched.npy is not an array of \(8,\)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_reported_and_begun_anew(tmp_path, name, capsys):
    array, damage, message = DAMAGES[name]
    store = open_store(tmp_path / "store", 8, 4, 3)
    store.write(1, np.array([0, 2]), np.float32([-1, -2]), np.float32([-3, -4]))
    assert not open_store(tmp_path / "store", 8, 4, 3).is_missing(4)[1] and capsys.readouterr().err == ""
    damage(tmp_path / "store" / f"{array}.npy")
    again = open_store(tmp_path / "store", 8, 4, 3)
    assert again.is_missing(4).all() and np.isnan(again.matched).all()
    said = capsys.readouterr().err
    assert re.search(message, said) and said.endswith("log-probabilities are computed again.\n")
    again.write(1, np.array([0, 2]), np.float32([-1, -2]), np.float32([-3, -4]))
    assert open_store(tmp_path / "store", 8, 4, 3).matched[2] == -2 and capsys.readouterr().err == ""


def test_a_process_that_has_a_store_open_keeps_it_when_another_begins_it_anew(tmp_path):
    store = open_store(tmp_path / "store", 8, 4, 3)
    store.write(1, np.array([0]), np.float32([-1]), np.float32([-3]))
    (tmp_path / "store" / "unmatched.npy").unlink()
    np.save(tmp_path / "store" / "unmatched.npy", np.zeros(2))
    open_store(tmp_path / "store", 8, 4, 3)
    assert store.matched[0] == -1 and store.unmatched[1, 0] == -3


def test_a_store_of_an_earlier_version_is_kept_and_reported_as_unchecked(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    matched, unmatched = np.full(8, np.nan, np.float32), np.float32(np.arange(12).reshape(4, 3))
    np.save(tmp_path / "store" / "matched.npy", matched)
    np.save(tmp_path / "store" / "unmatched.npy", unmatched)
    for num_said in (2, 0):
        store = open_store(tmp_path / "store", 8, 4, 3)
        np.testing.assert_array_equal(store.unmatched, unmatched)
        assert np.isnan(store.matched).all()
        said = capsys.readouterr().err.splitlines()
        assert len(said) == num_said and all(
            "without complements, so its numbers are unchecked" in line for line in said
        )


@pytest.mark.parametrize("change", [
    {"batch_size": 8}, {"max_length": 39}, {"shuffle": False}, {"unmatched": False}, {"paired": True},
])  # fmt: skip
def test_the_key_covers_everything_that_determines_the_sequences(change):
    index = named(make_index(64, paired=True))
    assert make_schedule(index).key == make_schedule(index).key
    assert make_schedule(index, **change).key != make_schedule(index).key


def test_the_key_does_not_depend_on_packing():
    index = named(make_index(64))
    assert (
        make_schedule(index, row_length=160, microbatch_rows=1, completion_length=150).key == make_schedule(index).key
    )
