import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_jax.config import DataConfig
from kto_jax.data.index.conversions import convert, labels_from_scores, match_pairs, one_per_prompt, own_pairs
from kto_jax.data.permutation import noise
from kto_jax.data.rows.sources import sources_of

SCORES = [1, 2, 3, 6, 0, 4, 4, 7]
PROMPTS = np.array([9, 9, 9, 9, 2, 2, 5, 2], np.uint64)

rows_of = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans(), st.booleans()), max_size=60)


def label(scores, rule, *, prompts=None, threshold=0.0, seed=0):
    """The labels as text: + desirable, - undesirable, . unused."""
    prompts = np.zeros(len(scores), np.uint64) if prompts is None else prompts
    desirable, used = labels_from_scores(np.array(scores), prompts, rule=rule, threshold=threshold, seed=seed)
    assert desirable.dtype == used.dtype == bool
    return "".join("." if not u else "-+"[int(d)] for d, u in zip(desirable, used, strict=True))


def columns_of(rows):
    prompts, splits, desirable, used = np.array(rows, np.int64).reshape(-1, 4).T
    return prompts.astype(np.uint64), splits.astype(np.uint8), desirable.astype(bool), used.astype(bool)


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        ("threshold", 4.0, "---+-+++"),
        ("threshold", 3.5, "---+-+++"),
        ("mean", 0.0, "---+-+++"),  # 27 / 8
        ("median", 0.0, "---+-+++"),  # (3 + 4) / 2
        ("prompt_mean", 0.0, "--.+-+.+"),  # 3; 11 / 3; a prompt with one row
        ("prompt_median", 0.0, "--++-..+"),  # 2.5; 4; a prompt with one row
    ],
)
def test_each_rule_labels_by_hand_values(rule, threshold, expected):
    assert label(SCORES, rule, prompts=PROMPTS, threshold=threshold) == expected


@pytest.mark.parametrize(
    ("scores", "rule", "expected"),
    [
        ([1, 2, 3], "mean", "-.+"),
        ([3, 1, 2, 10], "median", "+--+"),
        ([3, 1, 3, 10], "median", ".-.+"),
        ([5, 5, 5], "mean", "..."),
        ([0.1] * 3, "mean", "..."),  # their sum over three is above each of them, in float64
        ([0.1] * 3, "prompt_mean", "..."),
        ([0.1, 0.3, 0.2], "prompt_mean", "-+."),
        ([-3e38, 3e38, 0], "mean", "-+."),
        ([1e-30, 3e-30, 2e-30], "mean", "-+."),
        ([7], "median", "."),
    ],
)
def test_scores_equal_to_the_mean_or_median_are_left_out(scores, rule, expected):
    assert label(scores, rule) == expected


def test_a_score_at_the_threshold_is_desirable():
    assert label([0.7, np.nextafter(0.7, 0), -0.0], "threshold", threshold=0.7) == "+--"
    assert label([0.0, -0.0, -1e-300], "threshold") == "++-"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=40))
def test_prompt_rules_agree_with_a_loop_over_prompts(rows):
    prompts, scores = (np.array(column) for column in zip(*rows, strict=True))
    for rule, pivot in (("prompt_mean", np.mean), ("prompt_median", np.median)):
        pivots = np.array([pivot(scores[prompts == prompt]) for prompt in prompts])
        expected = np.select([np.isclose(scores, pivots, atol=1e-9), scores > pivots], [".", "+"], "-")
        assert label(scores, rule, prompts=prompts.astype(np.uint64)) == "".join(expected)


@pytest.mark.parametrize("score", [-2.0, 0.0, 1.5])
def test_bernoulli_labels_are_as_frequent_as_the_logistic_of_the_score(score):
    share = label([score] * 40_000, "bernoulli").count("+") / 40_000
    assert abs(share - 1 / (1 + np.exp(-score))) < 0.01


def test_bernoulli_labels_depend_on_the_seed_alone_and_stay_when_rows_are_added():
    first = label([0.0] * 200, "bernoulli", seed=3)
    assert first == label([0.0] * 200, "bernoulli", seed=3, prompts=np.arange(200))
    assert first == label([0.0] * 300, "bernoulli", seed=3)[:200]
    assert first != label([0.0] * 200, "bernoulli", seed=4)
    assert label([-3e38, 3e38] * 50, "bernoulli") == "-+" * 50


def test_noise_has_even_bits_and_neighbours_are_unrelated():
    bits = np.unpackbits(noise(10_000, (0, 1)).view(np.uint8)).reshape(10_000, 64)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.025
    values = noise(10_000, (0, 1)) / 2.0**64
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04 and len(np.unique(values)) == 10_000
    assert not np.isin(noise(1000, (0, 2)), noise(1000, (0, 1))).any()


@settings(max_examples=150, deadline=None)
@given(rows_of, st.integers(0, 2**40))
def test_a_pair_is_a_desirable_and_an_undesirable_row_of_one_prompt_and_split_used_once(rows, seed):
    prompts, splits, desirable, used = columns_of(rows)
    rejected = match_pairs(prompts, splits, desirable, used, seed)
    assert rejected.dtype == np.int64 and len(rejected) == len(rows)
    chosen = np.flatnonzero(rejected >= 0)
    partners = rejected[chosen]
    assert (desirable & used)[chosen].all() and (~desirable & used)[partners].all()
    assert len(set(partners)) == len(partners)
    assert (prompts[chosen] == prompts[partners]).all() and (splits[chosen] == splits[partners]).all()
    # As many as there can be.
    groups = {(p, s) for p, s, _, _ in rows}
    inside = [(prompts == p) & (splits == s) & used for p, s in groups]
    assert len(chosen) == sum(min(np.sum(g & desirable), np.sum(g & ~desirable)) for g in inside)


def test_which_completions_are_paired_depends_on_the_seed_and_every_match_is_as_likely():
    desirable = np.array([True] * 3 + [False] * 2)
    arguments = np.zeros(5, np.uint64), np.zeros(5, np.uint8), desirable, np.ones(5, bool)
    draws = np.array([match_pairs(*arguments, seed) for seed in range(1200)])
    for row in range(3):
        counts = np.bincount(draws[:, row] + 1, minlength=6)
        assert counts[[0, 4, 5]].min() > 330 and counts[[1, 2, 3]].sum() == 0
    assert np.array_equal(match_pairs(*arguments, 7), match_pairs(*arguments, 7))


@settings(max_examples=100, deadline=None)
@given(rows_of, st.integers(0, 2**40))
def test_one_used_row_of_each_prompt_and_split_is_kept(rows, seed):
    prompts, splits, _, used = columns_of(rows)
    kept = one_per_prompt(prompts, splits, used, seed)
    groups = list(zip(prompts[kept].tolist(), splits[kept].tolist(), strict=True))
    assert sorted(groups) == sorted({(p, s) for p, s, _, u in rows if u}) and not (kept & ~used).any()


def test_which_row_of_a_prompt_is_kept_depends_on_the_seed_and_each_is_as_likely():
    arguments = np.zeros(4, np.uint64), np.zeros(4, np.uint8), np.array([True, True, False, True])
    draws = np.array([one_per_prompt(*arguments, seed) for seed in range(900)])
    assert draws.sum(axis=0)[[0, 1, 3]].min() > 250 and (draws.sum(axis=1) == 1).all()


def test_a_pair_of_the_file_is_dropped_where_one_of_its_rows_is_not_used():
    used = np.array([True, True, True, False, False, True, True, True])
    assert own_pairs(used).tolist() == [1, -1, -1, -1, -1, -1, 7, -1]
    assert own_pairs(np.zeros(0, bool)).tolist() == []


def test_a_completion_that_was_called_both_is_no_pair_with_itself():
    columns = {
        "prompt_hashes": np.array([7, 7, 8, 8], np.uint64),
        "pair_hashes": np.array([1, 1, 2, 3], np.uint64),
        "splits": np.zeros(4, np.uint8),
        "desirable": np.array([True, False, True, False]),
        "scores": np.zeros(4, np.float32),
        "sources": np.zeros(4, np.int64),
    }
    data = DataConfig(train="x")
    assert convert(columns, data, sources_of(data))[0]["rejected"].tolist() == [-1, -1, 3, -1]
