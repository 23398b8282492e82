"""The loop: when it logs, saves and reports; with real runs of the tiny model where needed."""

import contextlib
import dataclasses
import gzip
import json
import types

import numpy as np
import pytest

import kto_jax.training.loop
from kto_jax.config import CheckpointConfig, Config, EvaluationConfig, ProfileConfig
from kto_jax.storage.run_place import RunPlace
from kto_jax.train import main
from kto_jax.training.loop import Job, Profile, take_steps
from kto_jax.training.patience import Patience
from tests import ROOT

NUM_STEPS = 6


class World:
    """Records events in order; replaces devices, checkpoints and signals."""

    def __init__(self, monkeypatch, tmp_path, *, bad_from=None, stop_at=None, losses=(), before=(), **config):
        self.events = []
        self.losses, self.before = dict(losses), dict(before)
        self.folder = tmp_path
        self.bad_from, self.stop_at = bad_from, stop_at
        self.config = dataclasses.replace(
            Config(), trackers=(), max_bad_steps=2, **{"checkpoint": CheckpointConfig(every=100)} | config
        )
        monkeypatch.setattr(kto_jax.training.loop, "_batches", lambda job, steps: self.hold(self.batches(steps)))
        write = kto_jax.training.loop.MetricsLog.write
        monkeypatch.setattr(
            kto_jax.training.loop.MetricsLog, "write",
            lambda log, step, row: (self.events.append(f"log {step}"), write(log, step, row)),
        )  # fmt: skip

    def hold(self, batches):
        self.held = batches  # Otherwise Python would close unreferenced objects.
        return batches

    def batches(self, steps):
        try:
            for _ in steps:
                yield types.SimpleNamespace(matched=types.SimpleNamespace(tokens=types.SimpleNamespace(shape=(1,))))
        finally:
            self.events.append("batches closed")

    # The program.
    compile_seconds = 0.0

    def is_ready(self, batch):
        return True

    def __call__(self, state, batch):
        step = state.step + 1
        self.events.append(f"dispatch {step}")
        bad = 0 if self.bad_from is None else max(0, step - self.bad_from + 1)
        figures = {"loss": 1.0, "tokens": 1.0, "flops": 1.0, "num_bad_steps": float(bad)}
        return types.SimpleNamespace(step=step), figures

    # The checkpoints.
    def save(self, step, state, figures):
        assert state.step == step
        self.events.append(f"save {step} {figures['eval_loss']}" if figures is not None else f"save {step}")

    failure = ""

    def poll(self):
        pass

    def wait(self):
        self.events.append("saved")

    # The signals.
    exit_code = 75

    @contextlib.contextmanager
    def deferred(self):
        yield

    def requested(self):
        dispatched = [event for event in self.events if event.startswith("dispatch")]
        return self.stop_at is not None and len(dispatched) >= self.stop_at

    def evaluate(self, state):
        self.events.append(f"evaluate {state.step}")
        return {"eval_loss": self.losses.get(state.step, 0.5)}

    def inputs(self):
        """Two rows a step."""
        rows = types.SimpleNamespace(step=lambda step: types.SimpleNamespace(ids=np.array([2 * step, 2 * step + 1])))
        index = types.SimpleNamespace(place=lambda row: f"rows.jsonl:{row + 1}")
        return types.SimpleNamespace(num_steps=NUM_STEPS, schedule=rows, index=index)

    def run(self, *, evaluate=False, first=0):
        job = Job(
            self.config, self.inputs(), None, self, self.evaluate if evaluate else None,
            Patience(self.config.evaluation, self.before), 1.0, False,
        )  # fmt: skip
        return take_steps(job, RunPlace(self.folder), self, self, types.SimpleNamespace(step=first))[1]

    def rows(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def world(monkeypatch, tmp_path):
    return lambda **options: World(monkeypatch, tmp_path, **options)


def test_a_run_ends_early_once_the_held_out_figure_is_not_better_and_saves_that_step(world):
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.3, 5: 0.1}
    run = world(losses=losses, evaluation=EvaluationConfig(every=1, patience=2))
    assert run.run(evaluate=True) == 0
    assert run.events[-4:] == ["log 4", "save 4 0.3", "saved", "batches closed"]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]


def test_a_run_that_ended_early_takes_no_further_step_and_one_with_more_patience_does(world):
    before = {1: 0.3, 2: 0.4, 3: 0.4}
    ended = world(before=before, evaluation=EvaluationConfig(every=1, patience=2))
    assert ended.run(evaluate=True, first=3) == 0 and ended.events == []
    waiting = world(before=before, evaluation=EvaluationConfig(every=1, patience=3))
    assert waiting.run(evaluate=True, first=3) == 0
    assert [event for event in waiting.events if event.startswith("dispatch")] == ["dispatch 4"]


def test_a_row_is_written_after_the_next_step_is_dispatched_and_the_last_before_the_run_ends(world):
    run = world()
    assert run.run() == 0
    expected = ["dispatch 1"]
    for step in range(2, NUM_STEPS + 1):
        expected += [f"dispatch {step}", f"log {step - 1}"]
    assert run.events == [*expected, f"log {NUM_STEPS}", f"save {NUM_STEPS}", "batches closed", "saved"]
    assert [row["step"] for row in run.rows()] == list(range(1, NUM_STEPS + 1))


def test_all_rows_are_written_before_a_save_and_those_of_earlier_steps_before_an_evaluation(world):
    run = world(evaluation=EvaluationConfig(every=3), checkpoint=CheckpointConfig(every=2))
    assert run.run(evaluate=True) == 0
    order = run.events.index
    assert order("log 2") < order("save 2") < order("dispatch 3")
    assert order("log 2") < order("dispatch 3") < order("evaluate 3") < order("log 3") < order("save 3 0.5")
    assert order("save 3 0.5") < order("dispatch 4")
    assert [row["step"] for row in run.rows() if "eval_loss" in row] == [3, 6]


def test_too_many_bad_steps_end_a_run_with_their_rows_and_without_a_save(world, capsys):
    run = world(bad_from=3)
    assert run.run() == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "step 3 had a non-finite loss or gradient and changed nothing (1 in a row; config.max_bad_steps=2" in message
    assert "Its rows: 4 (rows.jsonl:5), 5 (rows.jsonl:6)" in message
    assert (
        "2 steps in a row had a non-finite loss or gradient, the last on 6 (rows.jsonl:7), 7 (rows.jsonl:8)" in message
    )
    assert [row["num_bad_steps"] for row in run.rows()] == [0, 0, 1, 2]
    assert run.events[-3:] == ["log 4", "saved", "batches closed"]
    assert "dispatch 6" not in run.events  # one step late at most
    assert not [event for event in run.events if event.startswith("save ")]


def test_bad_steps_at_a_step_that_would_be_saved_are_not_saved(world):
    run = world(bad_from=3, checkpoint=CheckpointConfig(every=4), evaluation=EvaluationConfig(every=4))
    assert run.run(evaluate=True) == 1
    assert "evaluate 4" not in run.events
    assert not [event for event in run.events if event.startswith("save ")]
    assert run.rows()[-1]["step"] == 4


def test_a_signal_saves_after_the_step_with_all_rows(world, capsys):
    run = world(stop_at=3)
    assert run.run() == 75
    assert run.events[-6:] == ["dispatch 3", "log 2", "log 3", "save 3", "saved", "batches closed"]
    assert "stopped by a signal after step 3; run the same command to resume" in capsys.readouterr().err


def test_time_based_checkpoints_are_saved_besides_step_based_ones(world, monkeypatch):
    class Timer:
        def __init__(self, minutes):
            assert minutes == 1.5

        def due(self, step):
            return step == 4

        def restart(self, step):
            run.events.append(f"restart {step}")

    monkeypatch.setattr(kto_jax.training.loop, "SaveTimer", Timer)
    run = world(checkpoint=CheckpointConfig(every=3, every_minutes=1.5))
    assert run.run() == 0
    saves = [event for event in run.events if event.startswith(("save ", "restart "))]
    assert saves == ["save 3", "restart 3", "save 4", "restart 4", "save 6", "restart 6"]


@pytest.mark.parametrize("where", ["save", "__call__", "evaluate"])
def test_after_any_error_the_log_and_the_batches_are_closed_and_earlier_rows_are_on_disk(world, where, monkeypatch):
    run = world(evaluation=EvaluationConfig(every=3), checkpoint=CheckpointConfig(every=3))
    method = getattr(World, where)

    def fail(self, *arguments):
        if "dispatch 3" in self.events:
            raise RuntimeError("no space left")
        return method(self, *arguments)

    monkeypatch.setattr(World, where, fail)
    closed = []
    close = kto_jax.training.loop.MetricsLog.close
    monkeypatch.setattr(kto_jax.training.loop.MetricsLog, "close", lambda log: (closed.append(True), close(log)))
    with pytest.raises(RuntimeError, match="no space left"):
        run.run(evaluate=True)
    assert closed == [True]
    assert run.events[-1] == "batches closed"
    assert "saved" not in run.events  # A failed step is not waited for.
    assert {row["step"] for row in run.rows()} >= {1, 2}


class Profiler:
    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: self.events.append("start"))
        monkeypatch.setattr("jax.profiler.stop_trace", lambda: self.events.append("stop"))


@pytest.mark.parametrize(
    "start, first, steps, traced", [(2, 0, 2, [3, 4]), (0, 0, 1, [1]), (2, 3, 3, [4, 5]), (9, 0, 2, [])]
)
def test_a_profile_traces_its_steps_with_nothing_else_in_flight(world, monkeypatch, start, first, steps, traced):
    profiler = Profiler(monkeypatch)
    run = world(profile=ProfileConfig(start=start, steps=steps))
    profiler.events = run.events
    assert run.run(first=first) == 0
    if not traced:
        assert "start" not in run.events
        return
    begin, end = run.events.index("start"), run.events.index("stop")
    inside = run.events[begin:end]
    assert [event for event in inside if event.startswith("dispatch")] == [f"dispatch {step}" for step in traced]
    assert f"log {traced[-1]}" in inside  # it has completed
    assert traced[0] == first + 1 or f"log {traced[0] - 1}" in run.events[:begin]


def test_a_profile_is_written_even_if_the_run_ends_within_it(monkeypatch, tmp_path):
    profiler = Profiler(monkeypatch)
    with contextlib.suppress(ZeroDivisionError), Profile(tmp_path, ProfileConfig(start=0, steps=100)) as profile:
        profile.before(1)
        raise ZeroDivisionError
    assert profiler.events == ["start", "stop"]


@pytest.mark.nightly
def test_a_run_leaves_traces_that_perfetto_and_xprof_open(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    options = ["--config.max_steps=4", "--config.profile.start=2", "--config.profile.steps=1", "--config.trackers="]
    assert main(["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *options]) == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "step" in names  # the annotation of the step
    assert list(trace.parent.glob("*.xplane.pb"))
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("tries, code, saved_again", [(2, 0, 2), (99, 1, 5)])
def test_the_last_step_is_saved_again_for_a_while_if_its_save_failed(world, monkeypatch, tries, code, saved_again):
    monkeypatch.setattr(kto_jax.training.loop, "_RETRY_SECONDS", 0)
    run = world()
    run.failure, run.exit_code, again = "no space", 1, []

    def save_again(state):
        again.append(state.step)
        run.failure = "no space" if len(again) < tries else ""

    run.save_again = save_again
    assert run.run() == code and again == [NUM_STEPS] * saved_again


def test_nothing_is_saved_again_after_too_many_bad_steps(world):
    run = world(bad_from=2)
    run.failure, run.exit_code = "no space", 1
    assert run.run() == 1
