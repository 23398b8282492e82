"""The benchmark of decoding: what it times of our sampler, and how it sums up."""

import argparse

from benchmarks.decode import summarise, take_turn


def test_no_completion_ends_early_and_each_batch_size_is_timed():
    options = argparse.Namespace(
        contender="kto_jax", architecture="configs/tiny_model", dtype="float32", batches=[2], prompt=4, new_tokens=3,
        repeats=2,
    )  # fmt: skip
    turn = take_turn(options)
    assert len(turn["seconds"]["2"]) == 2 and all(second > 0 for second in turn["seconds"]["2"])


def test_rates_are_medians_over_all_rounds_and_the_ratio_is_ours_by_theirs():
    options = argparse.Namespace(batches=[4], new_tokens=10)
    turns = {
        "kto_jax": [{"seconds": {"4": [1.0, 9.0]}}, {"seconds": {"4": [2.0]}}],
        "transformers": [{"seconds": {"4": [4.0]}}],
    }
    assert summarise({"turns": turns}, options) == {"4": {"kto_jax": 20.0, "transformers": 10.0, "ratio": 2.0}}
    assert summarise({"turns": turns | {"transformers": []}}, options) == {"4": {"kto_jax": 20.0}}
