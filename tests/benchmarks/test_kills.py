"""The benchmarks that injure runs: when they do, and what they count."""

import random
import types

import pytest

from benchmarks import kills
from benchmarks.faults import replace_part


class Run:
    """A run whose every life takes ten more steps than the last one saved, and that saves every five."""

    def __init__(self, num_steps):
        self.workdir, self.num_steps, self.taken, self.waits = "run", num_steps, 0, []
        self.finished = False

    def start(self):
        self.taken = max(self.steps())
        return types.SimpleNamespace(
            kill=lambda: None, wait=lambda: -9, poll=lambda: 75, send_signal=print, returncode=75
        )

    def wait_for_state(self, process):
        self.waits.append("state")

    def wait_for_rows(self, number, process):
        self.waits.append(number)
        self.taken = max(number, self.taken)
        return True

    def steps(self):
        return [self.taken - self.taken % 5]

    def num_rows(self):
        return self.taken

    def finish(self):
        self.finished = True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(kills.time, "sleep", lambda seconds: None)


def test_a_run_is_killed_at_chosen_and_at_random_steps():
    run = Run(200)
    assert kills.kill(run, 20, random.Random(0)) == (20, 4)
    assert run.waits[:4] == ["state", 1, 6, 13] and run.waits[-2:] == [199, 200] and len(run.waits) == 20
    assert run.waits[4:18] == list(range(14, 28)) and run.finished


def test_a_storm_is_survived_if_the_last_step_was_saved():
    run = Run(200)
    assert kills.storm(run, 10, random.Random(0)) == (2, 4)  # steps 5 and 10
    assert run.finished


def test_rows_of_the_other_signal_and_place_stay_in_the_page():
    rows = [
        f"| {place} | 20 times {text} | ... |\n"
        for place in ("disk", "bucket")
        for text in ("SIGKILL", "SIGTERM every")
    ]
    found = kills._rows(
        f"| disk | 1 times SIGKILL |\n{kills.BEGIN}\nLast run\n\n{kills._HEAD}{''.join(rows)}{kills.END}\n"
    )
    assert list(found.values()) == rows
    assert list(found)[1:3] == [("disk", "SIGTERM"), ("bucket", "SIGKILL")]


def test_only_what_stands_between_the_comments_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n")
    replace_part(page, "<!-- a -->", "<!-- b -->", "new\n")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- b -->\nafter\n"
