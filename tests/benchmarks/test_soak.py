"""The benchmark that disturbs runs for an hour: what it does to them, and what it counts."""

import random
import types

import pytest

from benchmarks import soak


class Life:
    """A process that ends when it is told to."""

    pid, returncode = 0, None

    def poll(self):
        return self.returncode

    def wait(self):
        self.returncode = 0 if self.returncode is None else self.returncode
        return self.returncode

    def kill(self):
        self.returncode = -9

    def terminate(self):
        self.returncode = 75


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints of one file each, whose processes do nothing."""
    for step in (5, 10):
        (tmp_path / f"checkpoints/{step}/state/d").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step}/state/d/data").write_bytes(bytes(8))
    lives = []
    return types.SimpleNamespace(
        path=tmp_path,
        workdir="run",
        num_steps=100,
        lives=lives,
        num_rows=lambda: 12,
        steps=lambda: [5, 10],
        start=lambda: lives.append(Life()) or lives[-1],
        wait_for_rows=lambda number, process: True,
        finish=lambda: lives.append("finished"),
        tail=lambda: "what it said",
    )


@pytest.fixture
def seconds(monkeypatch):
    """The clock of the benchmark, which sleeping moves on."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(soak, "time", clock)
    return now


def test_lives_are_disturbed_until_the_time_is_up_and_the_run_finishes(run, seconds, monkeypatch):
    monkeypatch.setattr(soak.Soak, "_full_disk", lambda self, process: self.counts.update(["full disk"]))
    monkeypatch.setattr(soak, "use_of", lambda process: soak.Use(100 + seconds[0], 7))
    soaked = soak.Soak(run, random.Random(1))
    soaked.last(600)
    assert 600 <= seconds[0] < 700 and run.lives[-1] == "finished"
    counts = soaked.counts
    assert counts["SIGKILL"] and counts["SIGTERM"] and counts["full disk"] > 50 and counts["flipped bit"]
    assert counts["exit code -9"] == counts["SIGKILL"] and counts["exit code 75"] == counts["SIGTERM"]
    assert len(soaked.growth) > 5 and all(use.files == 0 and 40 < use.memory < 60 for use in soaked.growth[:-1])
    data = [(run.path / f"checkpoints/{step}/state/d/data").read_bytes() for step in (5, 10)]
    assert data[0] == bytes(8) and sum(byte.bit_count() for byte in data[1]) % 2 == counts["flipped bit"] % 2


def test_a_life_that_ends_with_another_code_ends_the_soak(run, seconds):
    run.wait_for_rows = lambda number, process: False
    run.start = lambda: types.SimpleNamespace(wait=lambda: 2, returncode=2)
    with pytest.raises(RuntimeError, match="exit code 2: what it said"):
        soak.Soak(run, random.Random(0)).last(60)


@pytest.mark.exhaustive
def test_a_short_soak_ends_with_the_results_of_undisturbed_runs(tmp_path):
    rows, all_equal = soak.soak(tmp_path, 0.5, 0)
    assert all_equal and len(rows) == 2
