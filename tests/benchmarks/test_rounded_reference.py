"""The summary of what rounding a reference does."""

import numpy as np
import pytest

from benchmarks.rounded_reference import KINDS, summarise


def test_errors_and_times_are_relative_to_float32():
    logps = {kind: np.array([-100.0, -50.0]) for kind in KINDS} | {"nf4": np.array([-104.0, -49.0])}
    seconds = {kind: [2.0, 4.0, 9.0] for kind in KINDS} | {"nf4": [6.0, 1.0, 8.0]}
    size = dict.fromkeys(KINDS, 4_000_000)
    rows = summarise({"beta": 0.1, "logps": logps, "seconds": seconds, "bytes": size})
    assert rows["float32"] == {
        "megabytes": 4.0, "logp_mean": 0.0, "logp_max": 0.0, "reward_mean": 0.0, "reward_max": 0.0, "time": 1.0,
    }  # fmt: skip
    expected = {"logp_mean": 2.5, "logp_max": 4.0, "reward_mean": 0.25, "reward_max": 0.4, "time": 1.5}
    assert {name: rows["nf4"][name] for name in expected} == pytest.approx(expected)
