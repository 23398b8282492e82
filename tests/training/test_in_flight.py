"""Steps in flight: metrics are read later, but the timing is that of the steps."""

import threading
import types

import numpy as np
import pytest

from kto_jax.training.in_flight import StepsInFlight


class Clock:
    """A clock that tests advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Devices:
    """Completes steps when a test asks for it; replaces jax.device_get."""

    def __init__(self, clock, monkeypatch):
        self.clock = clock
        self.completions = {}
        monkeypatch.setattr("kto_jax.training.in_flight.jax.device_get", self._get)

    def _get(self, figures):
        assert self.completions[figures["step"]].wait(60)
        return figures

    def dispatched(self, step):
        self.completions[step] = threading.Event()

    def complete(self, in_flight, step, at):
        """Completes the oldest step in flight at a given time."""
        self.clock.now = at
        self.completions[step].set()
        place = [entry.step for entry in in_flight._steps].index(step)
        in_flight._steps[place].result.result(60)


class Program:
    """A step of 100 tokens and 1000 FLOPs; `compiling` seconds are spent on the next call."""

    def __init__(self, clock, devices):
        self.clock, self.devices = clock, devices
        self.compile_seconds, self.compiling = 0.0, 0.0

    def is_ready(self, batch):
        return not self.compiling

    def __call__(self, state, batch):
        self.clock.now += self.compiling
        self.compile_seconds += self.compiling
        self.compiling = 0.0
        self.devices.dispatched(state + 1)
        return state + 1, {"step": state + 1, "tokens": 100.0, "flops": 1000.0}


BATCH = types.SimpleNamespace(matched=types.SimpleNamespace(tokens=np.zeros((1, 2, 3))))


@pytest.fixture
def setting(monkeypatch):
    clock = Clock()
    devices = Devices(clock, monkeypatch)
    with StepsInFlight(1000.0, peak_is_measured=False, clock=clock) as in_flight:
        yield clock, devices, Program(clock, devices), in_flight


def arrivals(clock, *times):
    for time in times:
        clock.now = max(clock.now, time)
        yield BATCH


def test_a_steps_time_is_from_the_previous_completion_to_its_own(setting):
    clock, devices, program, in_flight = setting
    batches = in_flight.timed_batches(arrivals(clock, 0, 0, 0))
    in_flight.dispatch(1, program, 0, next(batches))
    in_flight.dispatch(2, program, 1, next(batches))
    devices.complete(in_flight, 1, at=2.0)
    clock.now = 9.0  # However late the metrics are read.
    step, figures = in_flight.read()
    assert (step, figures["seconds"], figures["wait_seconds"]) == (1, 2.0, 0.0)
    assert figures["tokens_per_second"] == 50.0
    assert figures["mfu"] == 0.5
    assert "compile_seconds" not in figures
    devices.complete(in_flight, 2, at=10.0)
    assert in_flight.read()[1]["seconds"] == 8.0
    assert len(in_flight) == 0


def test_a_wait_for_a_batch_counts_only_while_the_devices_are_idle(setting):
    clock, devices, program, in_flight = setting
    batches = in_flight.timed_batches(arrivals(clock, 1.0, 5.0, 9.0))
    in_flight.dispatch(1, program, 0, next(batches))
    in_flight.dispatch(2, program, 1, next(batches))  # It arrives at 5, while step 1 runs.
    devices.complete(in_flight, 1, at=6.0)
    first = in_flight.read()[1]
    assert (first["wait_seconds"], first["seconds"]) == (1.0, 5.0)
    devices.complete(in_flight, 2, at=7.0)
    in_flight.dispatch(3, program, 2, next(batches))  # It arrives at 9, two seconds after step 2 completed.
    second = in_flight.read()[1]
    assert (second["wait_seconds"], second["seconds"]) == (0.0, 1.0)
    devices.complete(in_flight, 3, at=10.0)
    third = in_flight.read()[1]
    assert (third["wait_seconds"], third["seconds"]) == (2.0, 1.0)


def test_compiling_is_reported_and_not_part_of_the_step(setting, capsys):
    clock, devices, program, in_flight = setting
    batches = in_flight.timed_batches(arrivals(clock, 0, 0))
    program.compiling = 30.0
    in_flight.dispatch(1, program, 0, next(batches))
    assert "compiling the step for rows of 1 × 2 × 3 tokens" in capsys.readouterr().err
    program.compiling = 4.0  # from 30 to 34; step 1 completes at 31
    in_flight.dispatch(2, program, 1, next(batches))
    clock.now = 31.0
    devices.complete(in_flight, 1, at=31.0)
    assert in_flight.read()[1].items() >= {"seconds": 1.0, "compile_seconds": 30.0}.items()
    devices.complete(in_flight, 2, at=40.0)
    assert in_flight.read()[1].items() >= {"seconds": 6.0, "compile_seconds": 4.0}.items()


def test_a_pause_between_steps_belongs_to_no_step(setting):
    clock, devices, program, in_flight = setting
    batches = in_flight.timed_batches(arrivals(clock, 0, 0))
    in_flight.dispatch(1, program, 0, next(batches))
    devices.complete(in_flight, 1, at=1.0)
    in_flight.read()
    clock.now = 100.0  # An evaluation.
    in_flight.resume()
    in_flight.dispatch(2, program, 1, next(batches))
    devices.complete(in_flight, 2, at=103.0)
    assert in_flight.read()[1]["seconds"] == 3.0


@pytest.mark.parametrize("measured, mfu", [(True, 1.0), (False, 10.0)])
def test_a_step_faster_than_a_measured_peak_raises_it_and_one_faster_than_a_published_one_shows(
    measured, mfu, monkeypatch, capsys
):
    clock = Clock()
    devices = Devices(clock, monkeypatch)
    program = Program(clock, devices)
    with StepsInFlight(100.0, peak_is_measured=measured, clock=clock) as in_flight:
        in_flight.dispatch(1, program, 0, next(in_flight.timed_batches([BATCH])))
        devices.complete(in_flight, 1, at=1.0)
        assert in_flight.read()[1]["mfu"] == mfu
    assert ("above the" in capsys.readouterr().err) == measured


def test_errors_on_the_devices_are_raised_when_the_row_is_read(setting, monkeypatch):
    _, _, program, in_flight = setting

    def fail(figures):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("kto_jax.training.in_flight.jax.device_get", fail)
    in_flight.dispatch(1, program, 0, next(in_flight.timed_batches([BATCH])))
    with pytest.raises(RuntimeError, match="out of memory"):
        in_flight.read()
