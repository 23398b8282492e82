"""Feedback made of rewards."""

import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import completions_of, records_of
from kto_jax.rollouts.labels import check_rule, label


def rows(*rewards, prompt="Q?", ended=True):
    return [
        {"prompt": prompt, "completion": f"{prompt} {i}", "reward": reward, "ended": ended, "prompt_id": prompt,
         "sample": i, "round": 3, "prompt_ids": [1, 2], "completion_ids": [7 + i, 8]}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip


def thumbs(found):
    return [(row["output"], row["label"]) for row in found.rows]


@pytest.mark.parametrize("rule, expected", [
    ("mean", {0: 0, 1: 0, 4: 1, 8: 1}),
    ("median", {0: 0, 1: 0, 4: 1, 8: 1}),
    (4.0, {0: 0, 1: 0, 4: 1, 8: 1}),
])  # fmt: skip
def test_thumbs_are_what_exceeds_the_threshold(rule, expected):
    found = label(rows(0, 1, 4, 8), pairs=False, rule=rule, keep_cut=False)
    assert dict(zip((0, 1, 4, 8), (row["label"] for row in found.rows), strict=True)) == expected
    assert found.desirable == sum(expected.values()) and not found.dropped


def test_a_prompts_own_mean_tells_its_completions_apart():
    found = label(rows(0, 1) + rows(5, 7, prompt="R?"), pairs=False, rule="prompt_mean", keep_cut=False)
    assert thumbs(found) == [("Q? 0", 0), ("Q? 1", 1), ("R? 0", 0), ("R? 1", 1)]


def test_what_teaches_nothing_is_dropped_and_counted():
    rollout = rows(0, 1, 2, None) + rows(9, ended=False, prompt="cut")
    rollout += [{**rows(2, prompt="empty")[0], "completion": " \n"}]
    found = label(rollout, pairs=False, rule="mean", keep_cut=False)
    assert thumbs(found) == [("Q? 0", 0), ("Q? 2", 1)]
    assert found.dropped == {"no reward applies": 1, "cut before its end": 1, "empty": 1, "equals the mean": 1}
    kept = label(rollout, pairs=False, rule="mean", keep_cut=True)
    assert ("cut 0", 1) in thumbs(kept)
    # 0.1 · 3 differs from its own mean by rounding.
    assert label(rows(0.1 + 0.2, 0.3), pairs=False, rule="mean", keep_cut=False).rows == []


def test_pairs_are_the_best_and_the_worst_of_a_prompt():
    found = label(
        rows(2, 0, 1) + rows(1, 1, prompt="R?") + rows(4, prompt="S?"), pairs=True, rule="mean", keep_cut=False
    )
    (row,) = found.rows
    assert (row["output_A"], row["output_B"], row["label"], row["reward_A"], row["reward_B"]) == (
        "Q? 0",
        "Q? 1",
        1,
        2,
        0,
    )
    assert found.dropped == {"neither best nor worst": 1, "of a prompt without a best and a worst": 3}


@pytest.mark.parametrize("pairs", [False, True])
def test_the_rows_are_those_of_the_halos_code(pairs):
    found = label(rows(0, 1), pairs=pairs, rule="mean", keep_cut=False)
    format = "pairs" if pairs else "thumbs"
    read = list(records_of(iter([(f"a:{i}", row) for i, row in enumerate(found.rows)]), DataConfig(format=format)))
    if pairs:
        assert [(one.chosen.completion, one.rejected.completion) for one in read] == [("Q? 1", "Q? 0")]
    else:
        assert [(one.prompt, one.completion, one.desirable) for one in read] == [
            ("Q?", "Q? 0", False),
            ("Q?", "Q? 1", True),
        ]
    assert {"round", "prompt_id", "sample"} <= found.rows[0].keys()
    sampled = DataConfig(format=format, sampled_tokens=True, layout="halos")
    read = list(records_of(iter([(f"a:{i}", row) for i, row in enumerate(found.rows)]), sampled))
    ids = [list(one.sampled.completion) for record in read for one in completions_of(record)]
    assert ids == ([[8, 8], [7, 8]] if pairs else [[7, 8], [8, 8]])


def test_a_rule_is_a_name_or_a_number():
    assert [check_rule(rule) for rule in ("mean", "0.5", "-1e3")] == ["mean", 0.5, -1000.0]
    for rule in ("average", "nan", ""):
        with pytest.raises(ConfigError, match=r"is no rule. Allowed: mean, median, prompt_mean or a number"):
            check_rule(rule)
