"""The benchmark of one device's step: what it measures on a toy, and how it looks for the longest rows."""

import argparse

from benchmarks import device_step


def test_a_step_of_filled_rows_is_measured_with_weights_and_moments_in_bfloat16():
    job = {
        "architecture": "configs/tiny_model", "dtype": "float32", "kept": "bfloat16", "remat": "full", "batch": 2,
        "rows": 1, "per_row": 2, "steps": 1, "length": 32,
    }  # fmt: skip
    figures = device_step.measure(job)
    assert figures["tokens"] == 2 * 16 and len(figures["seconds"]) == 1
    assert figures["flops"] > 0 and figures["peak_bytes"] > 2**27 and 0 < figures["loss"] < 1


def test_the_longest_rows_are_found_to_a_sixteenth(monkeypatch):
    tried = []

    def take(options, length):
        tried.append(length)
        return {"length": length} if length <= 5000 else None

    monkeypatch.setattr(device_step, "take", take)
    assert device_step.find_longest(argparse.Namespace(), 1024) == {"length": 4864}
    assert tried == [1024, 2048, 4096, 8192, 6144, 5120, 4608, 4864]
    assert device_step.find_longest(argparse.Namespace(), 8192) is None
