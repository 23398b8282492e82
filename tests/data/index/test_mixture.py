"""Sources with their own settings, and how often an epoch visits their rows."""

import collections
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_jax.config import ConfigError, DataConfig, resolve
from kto_jax.data.batches.visits import Visits
from kto_jax.data.index import index as index_module
from kto_jax.data.index.manifest import weights_of
from kto_jax.data.permutation import permute
from kto_jax.data.rows.sources import sources_of
from kto_jax.models.config import TransformerConfig
from kto_jax.storage.run_place import RunPlace
from kto_jax.training.run_folder import open_run
from tests import synthetic
from tests.data.batches.indices import fake_index, make_schedule, paired_index, random_index

ARCHITECTURE = TransformerConfig(
    vocab_size=512, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, max_length=64
)


def visits_of(sizes, weights, seed=0):
    """Visits of sources with the given numbers of rows; row ids start at 100."""
    sources = np.repeat(np.arange(len(sizes)), sizes)
    return Visits(
        100 + np.arange(len(sources)), np.concatenate([np.zeros(100, int), sources]), np.array(weights), seed=seed
    )


def epoch_of(visits, epoch):
    return visits.at(np.arange(len(visits)), epoch).tolist()


mixtures = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0, 2.5])), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None)
@given(mixtures.filter(lambda sources: any(size for size, _ in sources)), st.integers(0, 5), st.integers(1, 7))
def test_rows_of_a_source_are_visited_equally_often_in_every_epoch_and_over_all(sources, seed, num_epochs):
    sizes, weights = zip(*sources, strict=True)
    visits = visits_of(sizes, weights, seed)
    epochs = [epoch_of(visits, epoch) for epoch in range(num_epochs)]
    for rows in [*epochs, list(itertools.chain(*epochs))]:
        counts = collections.Counter(rows)
        first = 100
        for size, weight in sources:
            own = [counts[row] for row in range(first, first + size)]
            first += size
            assert max(own, default=0) - min(own, default=0) <= 1
            expected = max(math.floor(size * weight + 0.5), 1) if size else 0
            assert sum(own) == expected * (1 if rows in epochs else num_epochs)


def test_half_a_weight_visits_the_other_half_in_the_next_epoch_and_the_seed_says_which():
    visits = visits_of([10, 4], [0.5, 1.0])
    first, second, third = (epoch_of(visits, epoch) for epoch in range(3))
    assert len(visits) == 9 and sorted(first[:5] + second[:5]) == list(range(100, 110)) and third == first
    assert first[5:] == second[5:] == [110, 111, 112, 113]
    assert (
        first != sorted(first)
        and len({tuple(sorted(epoch_of(visits_of([10, 4], [0.5, 1.0], s), 0))) for s in range(9)}) > 4
    )


def test_a_weight_of_two_and_a_half_visits_each_row_twice_and_half_of_them_once_more():
    counts = [collections.Counter(epoch_of(visits_of([10], [2.5]), epoch)) for epoch in range(2)]
    assert [sorted(count.values()) for count in counts] == [[2] * 5 + [3] * 5] * 2
    assert {row for row in counts[0] if counts[0][row] == 3} == {row for row in counts[1] if counts[1][row] == 2}


def test_a_visit_does_not_depend_on_the_others():
    visits = visits_of([7, 5, 0, 9], [0.7, 2.0, 3.0, 1.3])
    whole = epoch_of(visits, 6)
    assert [int(visits.at(np.array([i]), 6)[0]) for i in range(len(visits))] == whole
    assert visits.at(np.array([3, 1, 3]), 6).tolist() == [whole[3], whole[1], whole[3]]


def test_rows_in_any_order_are_visited_by_their_source():
    rows = np.array([5, 0, 3, 1, 4, 2])
    visits = Visits(rows, np.array([0, 0, 0, 1, 1, 1]), np.array([1.0, 2.0]), seed=0)
    assert collections.Counter(epoch_of(visits, 0)) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2}


@pytest.mark.parametrize("weights", [None, np.ones(1), np.ones(3)])
def test_with_all_weights_one_the_order_is_that_without_weights(weights):
    index = random_index(37)
    index.places[:, 0] = 0 if weights is None else np.arange(37) * len(weights) // 37
    plain, weighed = make_schedule(index), make_schedule(index, weights=weights)
    assert weighed.num_steps == plain.num_steps == 10
    for step in range(10):
        epoch, first = step // 5, step % 5 * 8
        expected = permute(np.arange(first, min(first + 8, 37)), 37, (0, epoch)).tolist()
        assert weighed.step(step).ids.tolist() == plain.step(step).ids.tolist() == expected


def test_the_order_of_weight_one_sources_is_kept_beside_a_weighted_one_over_any_batch_size():
    index = random_index(40)
    index.places[20:, 0] = 1
    weights = np.array([1.0, 0.5])
    steps = [
        [make_schedule(index, weights=weights, batch_size=size).step(s).ids for s in range(30 // size)]
        for size in (5, 10)
    ]
    assert np.concatenate(steps[0]).tolist() == np.concatenate(steps[1]).tolist()
    rows = np.concatenate(steps[0])
    assert sorted(rows[rows < 20].tolist()) == list(range(20)) and len(set(rows[rows >= 20].tolist())) == 10
    is_second = rows >= 20
    assert 2 < np.argmax(is_second) + np.argmax(is_second[::-1]) < 28 or is_second[:15].any()  # interleaved
    assert 0 < is_second[:15].sum() < 10


def test_pairs_are_visited_by_the_weight_of_their_source_both_completions_side_by_side():
    index = paired_index(12)
    index.places[8:, 0] = 1
    rows = np.arange(0, 24, 2)
    schedule = make_schedule(
        index, ids=rows, weights=np.array([2.0, 0.5]), paired=True, row_length=96, completion_length=96, batch_size=4
    )
    assert schedule.num_examples == 4 * 2 + 4 and schedule.num_steps == 6
    visited = np.concatenate([schedule.step(step).ids for step in range(6)]).reshape(-1, 2)
    assert (visited[:, 1] == visited[:, 0] + 1).all()
    counts = collections.Counter(visited[:, 0].tolist())
    assert counts == {row: 4 if row < 8 else 1 for row in rows.tolist()}
    for step in range(6):
        batch, read = schedule.batch(step), schedule.step(step)
        assert np.sum(batch.matched.filled) == len(read.ids)
        has = read.partners >= 0
        assert (index.prompt_hashes[read.ids[has]] != index.prompt_hashes[read.partners[has]]).all()


def test_a_row_that_the_first_epoch_does_not_visit_must_fit_too():
    index = random_index(20)
    room = int(index.completion_lengths.max()) - 1
    for seed in range(4):
        with pytest.raises(ConfigError, match="the longest completion has"):
            make_schedule(index, weights=np.array([0.2]), seed=seed, completion_length=room)


def test_the_shape_of_a_step_is_that_of_the_rows_that_are_visited_often():
    index = fake_index([(3, 3)] * 50 + [(14, 24)] * 10)
    index.places[50:, 0] = 1
    settings = {"batch_size": 32, "microbatch_rows": 1, "epochs": 1}
    mixes = (None, np.array([0.1, 30.0]), np.array([30.0, 0.1]))
    plain, long, short = (make_schedule(index, weights=weights, **settings) for weights in mixes)
    shapes = {long.batch(step).matched.tokens.shape[0] for step in range(long.num_steps - 1)}
    assert shapes == {32} and plain.batch(0).matched.tokens.shape[0] == 16
    assert {short.batch(step).matched.tokens.shape[0] for step in range(8)} == {4}


# How sources are read.


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixed(tmp_path):
    """Four sources that share only their prompts."""
    return {
        "thumbs": write(tmp_path / "thumbs.jsonl", [
            {"q": f"Question {i}?", "a": f"Thumb {i}.", "up": "yes" if i % 3 else "no"} for i in range(12)
        ]),
        "pairs": write(tmp_path / "pairs.jsonl", [
            {"chosen": f"\n\nHuman: Question {i}?\n\nAssistant: Good {i}.",
             "rejected": f"\n\nHuman: Question {i}?\n\nAssistant: Bad {i}."} for i in range(8)
        ]),
        "scores": write(tmp_path / "scores.jsonl", [
            {"prompt": f"Question {i % 4}?", "completion": f"Scored {i}.", "score": i} for i in range(10)
        ]),
        "stars": write(tmp_path / "stars.jsonl", [
            {"prompt": "Stars?", "completion": f"Star {i}.", "score": 100 + i} for i in range(5)
        ]),
        "demonstrations": write(tmp_path / "demonstrations.jsonl", [
            {"prompt": f"Question {i}?", "completion": f"Shown {i}."} for i in range(3)
        ]),
    }  # fmt: skip


def mixture(mixed, **weights):
    entries = [
        {"source": mixed["thumbs"], "prompt_field": "q", "completion_field": "a", "label_field": "up",
         "label_map": {"yes": True, "no": False}},
        {"source": mixed["pairs"], "format": "pairs", "layout": "hh"},
        {"source": mixed["scores"], "format": "scores", "score_threshold": 5.0},
        {"source": mixed["stars"], "format": "scores", "score_rule": "mean"},
        {"source": mixed["demonstrations"], "format": "demonstrations"},
    ]  # fmt: skip
    names = list(mixed)
    return tuple(
        {**entry, **({"weight": weights[n]} if n in weights else {})} for n, entry in zip(names, entries, strict=True)
    )


def test_every_source_is_read_with_its_own_settings_into_one_index(make_index, mixed, tmp_path):
    index = make_index([], train=mixture(mixed), directory=tmp_path)
    manifest = index.manifest
    assert [source["accepted"] for source in manifest["sources"]] == [12, 8, 10, 5, 3] and manifest["rejected"] == 0
    assert [source["train"] for source in manifest["sources"]] == [
        {"desirable": 8, "undesirable": 4, "pairs": manifest["sources"][0]["train"]["pairs"]},
        {"desirable": 8, "undesirable": 8, "pairs": 8},
        {"desirable": 5, "undesirable": 5, "pairs": manifest["sources"][2]["train"]["pairs"]},
        {"desirable": 2, "undesirable": 2, "pairs": 2},
        {"desirable": 3, "undesirable": 0, "pairs": 0},
    ]
    sources = np.asarray(index.places[:, 0])
    pairs = index.pairs("train")
    of_pairs = pairs[sources[pairs] == 1]
    assert (index.rejected[of_pairs] == of_pairs + 1).all() and (of_pairs == np.arange(12, 28, 2)).all()
    others = index.rejected[pairs[sources[pairs] != 1]]
    # A pair of the file stays a pair: its completions are not matched with others.
    assert len(others) and not np.isin(sources[others], [1, 4]).any() and len(set(others.tolist())) == len(others)
    assert (index.prompt_hashes[pairs] == index.prompt_hashes[index.rejected[pairs]]).all()


def test_scores_with_their_own_rule_are_labelled_separately(make_index, mixed, tmp_path):
    index = make_index([], train=mixture(mixed), directory=tmp_path)
    assert [
        (scale["sources"], scale["rule"], scale["pivot"], scale["unused"]) for scale in index.manifest["scores"]
    ] == [
        ([mixed["scores"]], "threshold", 5.0, 0),
        ([mixed["stars"]], "mean", 102.0, 1),
    ]
    together = ({"source": mixed["scores"], "prompt_field": "prompt"}, mixed["stars"])
    index = make_index([], train=together, format="scores", score_rule="mean", directory=tmp_path)
    (scale,) = index.manifest["scores"]
    assert scale["sources"] == [mixed["scores"], mixed["stars"]] and 35 < scale["pivot"] < 38
    assert index.desirable.tolist() == [False] * 10 + [True] * 5


def test_two_files_of_one_source_have_one_scale(make_index, tmp_path):
    for name, score in (("a", 1), ("b", 9)):
        rows = [{"prompt": "Q?", "completion": f"{name}{i}.", "score": score + 2 * i} for i in range(2)]
        write(tmp_path / f"{name}.jsonl", rows)
    entry = {"source": str(tmp_path / "[ab].jsonl"), "format": "scores", "score_rule": "mean"}
    together = make_index([], train=(entry,), directory=tmp_path)
    assert [scale["pivot"] for scale in together.manifest["scores"]] == [6.0]
    apart = tuple({**entry, "source": str(tmp_path / f"{name}.jsonl")} for name in "ab")
    index = make_index([], train=apart, directory=tmp_path)
    assert [scale["pivot"] for scale in index.manifest["scores"]] == [2.0, 10.0]
    assert index.desirable.tolist() == [False, True, False, True]
    assert together.desirable.tolist() == [False, False, True, True]


def test_weights_rebuild_nothing_but_other_settings_of_a_source_do(make_index, mixed, tmp_path, monkeypatch):
    first = make_index([], train=mixture(mixed), directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "Builder", None)  # building would fail
        again = make_index([], train=mixture(mixed, thumbs=0.5, pairs=3.0), directory=tmp_path)
    assert again.directory == first.directory
    assert weights_of(first.manifest).tolist() == [1.0] * 5 and weights_of(again.manifest).tolist() == [0.5, 3, 1, 1, 1]
    assert again.manifest["data"]["train"][0]["weight"] == 0.5
    changed = ({**mixture(mixed)[0], "label_map": {"yes": False, "no": True}}, *mixture(mixed)[1:])
    assert make_index([], train=changed, directory=tmp_path).manifest["key"] != first.manifest["key"]


def test_the_manifest_holds_each_sources_share_of_an_epoch(make_index, mixed, tmp_path):
    train = mixture(mixed, thumbs=0.5, pairs=0.25)[:2]
    sources = make_index([], train=train, directory=tmp_path).manifest["sources"]
    assert [(s["weight"], s["share"]["completions"]) for s in sources] == [(0.5, 0.6), (0.25, 0.4)]  # 6 and 4 visits
    assert sources[0]["share"]["pairs"] == 0.0 and sources[1]["share"]["pairs"] == 1.0


def test_held_out_sources_are_read_with_their_own_settings_and_once_each(make_index, mixed, tmp_path):
    train, held_out = mixture(mixed, pairs=2.0)[1:2], mixture(mixed)[:1]
    index = make_index([], train=train, eval=held_out, directory=tmp_path)
    assert len(index.sequences("train")) == 16 and len(index.sequences("eval")) == 12
    assert [source["share"]["completions"] for source in index.manifest["sources"]] == [1.0, 0.0]


def test_an_epoch_of_a_mixture_is_planned_and_packed(make_index, mixed, tmp_path):
    index = make_index([], train=mixture(mixed, thumbs=0.5, scores=2.0), directory=tmp_path)
    schedule = synthetic.make_schedule(
        index, index.sequences("train"), batch_size=8, seed=3, epochs=2, weights=weights_of(index.manifest),
        row_length=128, microbatch_rows=2, max_length=128,
    )  # fmt: skip
    assert schedule.num_examples == 6 + 16 + 20 + 4 + 3
    read = [np.concatenate([schedule.step(s).ids for s in range(e * 7, e * 7 + 7)]) for e in range(2)]
    counts = [np.bincount(index.places[rows, 0], minlength=5).tolist() for rows in read]
    assert counts == [[6, 16, 20, 4, 3]] * 2
    thumbs = np.concatenate([rows[index.places[rows, 0] == 0] for rows in read])
    assert sorted(thumbs.tolist()) == list(range(12))


def test_the_sources_of_a_configuration_come_in_order_and_empty_ones_are_left_out():
    data = DataConfig(train=("a", {"source": "b", "weight": 2.0, "format": "pairs"}, ""), eval="c", layout="hh")
    assert [(s.number, s.path, s.split, s.weight, s.data.format, s.data.layout) for s in sources_of(data)] == [
        (0, "a", "train", 1.0, "thumbs", "hh"),
        (1, "b", "train", 2.0, "pairs", "hh"),
        (2, "c", "eval", 1.0, "thumbs", "hh"),
    ]


def test_a_run_is_resumed_with_the_weights_that_it_started_with(make_index, mixed, tmp_path, tokenizer):
    def open_with(**weights):
        config = resolve({"model": {"path": "m"}, "data": {"train": mixture(mixed, **weights)}})
        index = make_index([], train=config.data.train, directory=tmp_path)
        open_run(RunPlace(tmp_path / "run"), config, index, tokenizer, ARCHITECTURE).lock.close()
        return json.loads((tmp_path / "run" / "manifest.json").read_text())

    assert [source["weight"] for source in open_with(pairs=0.5)["sources"]] == [1, 0.5, 1, 1, 1]
    open_with(pairs=0.5)
    with pytest.raises(ConfigError, match=r"holds another run \(config.data.train: was .*'weight': 0.5.*'weight': 0.7"):
        open_with(pairs=0.7)
