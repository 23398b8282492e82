"""The benchmark of one device's step, which tests/packaging/test_slim.py measures: it looks for the longest rows."""

import argparse

from benchmarks import device_step


def test_the_longest_rows_are_found_to_a_sixteenth(monkeypatch):
    tried = []

    def take(options, length):
        tried.append(length)
        return {"length": length} if length <= 5000 else None

    monkeypatch.setattr(device_step, "take", take)
    assert device_step.find_longest(argparse.Namespace(), 1024) == {"length": 4864}
    assert tried == [1024, 2048, 4096, 8192, 6144, 5120, 4608, 4864]
    assert device_step.find_longest(argparse.Namespace(), 8192) is None
