"""The readers of models, feedback and templates take any input: they read it or refuse it with the error of their kind.

`python -m tests.faults.test_fuzz [INPUTS] [SKIP] [TARGET ...]` feeds 100,000 inputs to each, and prints the peak of
memory. SKIP leaves out as many that an earlier command has fed. A failure names the number of its input: with 1 for
INPUTS and that number for SKIP it is fed again.
"""

import collections
import resource
import sys
import time
import warnings

import pytest

from tests.faults.fuzz import TARGETS, check

MANY = 100_000


def feed(name, count, skip=0):
    """Feeds the inputs of the numbers from `skip` on to a target; counts those accepted and refused."""
    counts = collections.Counter()
    with warnings.catch_warnings():
        # NumPy warns of overflow in the sizes that gguf computes and then refuses.
        warnings.simplefilter("ignore", RuntimeWarning)
        for number in range(skip, skip + count):
            try:
                counts["accepted" if check(TARGETS[name], number) else "refused"] += 1
            except BaseException as error:
                error.add_note(f"Feed it again: python -m tests.faults.test_fuzz 1 {number} {name}")
                raise
    return counts


@pytest.mark.parametrize("name", TARGETS)
def test_readers_read_or_refuse_mutated_inputs(name):
    counts = feed(name, 200)
    assert counts["accepted"] > 0 and counts["refused"] > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
def test_readers_read_or_refuse_100_000_mutated_inputs(name):
    assert feed_many(name, MANY).total() == MANY


def feed_many(name, count, skip=0):
    """Feeds many inputs, and prints the counts, the time and the peak of memory."""
    started = time.monotonic()
    counts = feed(name, count, skip)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {dict(counts)}, no crash, {time.monotonic() - started:.0f} s, peak {peak:.2f} GiB", flush=True)
    return counts


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    for name in [word for word in sys.argv[1:] if word in TARGETS] or TARGETS:
        feed_many(name, *numbers or [MANY])
