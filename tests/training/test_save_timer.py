"""Time-based checkpoints: at the right time, with few messages, and agreed on by all processes."""

import itertools

import pytest

from kto_jax.training.save_timer import SaveTimer


class Run:
    """Steps of a given duration, in seconds, timed by one process; `others` receive its answers."""

    def __init__(self, minutes):
        self.now = 0.0
        self.answers = []
        self.timer = SaveTimer(minutes, clock=lambda: self.now, ask=self.ask)

    def ask(self, number):
        self.answers.append(number)
        return number

    def take(self, steps, pace):
        """The steps after which the timer was due, in a run that saves then."""
        due = []
        for step in steps:
            self.now += pace
            if self.timer.due(step):
                due.append((step, self.now))
                self.timer.restart(step)
        return due


def test_without_minutes_no_process_is_asked():
    run = Run(0)
    assert run.take(range(1, 100), pace=1000.0) == []
    assert run.answers == []


@pytest.mark.parametrize("pace", [0.05, 1.0, 7.0, 400.0])
def test_saves_are_the_requested_time_apart_plus_at_most_a_step(pace):
    run = Run(5)
    due = run.take(range(101, 101 + int(4000 / pace)), pace)
    assert len(due) == pytest.approx(4000 // max(300, pace), abs=1)
    times = [0.0] + [time for _, time in due]
    for before, after in itertools.pairwise(times):
        assert 300 - 1e-6 <= after - before <= 300 + pace + 1e-6


def test_few_questions_are_asked():
    run = Run(60)
    due = run.take(range(1, 36_002), pace=0.1)
    assert len(due) == 1
    assert len(run.answers) < 36_000 / 100 + 40


def test_steps_that_become_slower_are_noticed():
    run = Run(10)
    run.take(range(1, 1001), pace=0.1)  # 100 s
    (due, *_) = run.take(range(1001, 2000), pace=2.0)
    assert 600 <= due[1] <= 600 + 100 * 2.0


def test_a_save_for_another_reason_restarts_the_timer():
    run = Run(5)
    run.take(range(1, 200), pace=1.0)
    run.timer.restart(200)
    assert run.take(range(201, 201 + 299), pace=1.0) == []
    assert [step for step, _ in run.take(range(500, 503), pace=1.0)] == [500]


def test_all_processes_follow_the_first_whatever_their_own_clocks_say():
    first = SaveTimer(1, clock=iter(range(0, 10_000, 10)).__next__, ask=lambda own: record.append(own) or own)
    record: list[int] = []
    decisions = []
    for step in range(1, 50):
        decisions.append(first.due(step))
        if decisions[-1]:
            first.restart(step)
    told = iter(record)
    other = SaveTimer(1, clock=lambda: 0.0, ask=lambda own: next(told))
    for step, decided in enumerate(decisions, start=1):
        assert other.due(step) == decided
        if decided:
            other.restart(step)
    assert next(told, None) is None
