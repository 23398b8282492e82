"""The readers of models, feedback and templates take any input: they read it or refuse it with the error of their kind.

`python -m tests.faults.test_fuzz [INPUTS] [SKIP] [TARGET ...]` feeds 100,000 inputs to each, and prints the peak of
memory. SKIP leaves out as many that an earlier command has fed.
"""

import collections
import resource
import sys
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.faults.fuzz import TARGETS, check

MANY, ROUND = 100_000, 2_000
"""Inputs of the exhaustive test, and of one run of hypothesis, which remembers all inputs of a run."""
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def feed(name, count, number=0):
    """Feeds inputs to a target; counts those accepted and refused."""
    counts = collections.Counter()

    @seed(number)
    @settings(max_examples=count, **SETTINGS)
    @given(case=TARGETS[name].inputs)
    def run(case):
        counts["accepted" if check(TARGETS[name], case) else "refused"] += 1

    run()
    return counts


@pytest.mark.parametrize("name", TARGETS)
def test_readers_read_or_refuse_mutated_inputs(name):
    counts = feed(name, 200)
    assert counts.total() >= 200
    # One in fifty mutated safetensors files is still a model.
    assert counts["refused"] > 0 and (counts["accepted"] > 0 or name == "safetensors")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
def test_readers_read_or_refuse_100_000_mutated_inputs(name):
    assert feed_many(name, MANY).total() >= MANY


def feed_many(name, count, skip=0):
    """Feeds many inputs in rounds, and prints the counts, the time and the peak of memory."""
    started, counts = time.monotonic(), collections.Counter()
    for number in range(1 + skip // ROUND, 1 + skip // ROUND + max(count // ROUND, 1)):
        counts += feed(name, min(count, ROUND), number)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {dict(counts)}, no crash, {time.monotonic() - started:.0f} s, peak {peak:.2f} GiB", flush=True)
    return counts


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    for name in [word for word in sys.argv[1:] if word in TARGETS] or TARGETS:
        feed_many(name, *numbers or [MANY])
