"""Batches from loader processes: the same, in order, and every way in which a process can end is handled."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler, send_handle
from pathlib import Path

import jax
import numpy as np
import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.data.batches.prefetch import Loaders, _anonymous_file, _serve, _SharedMemory, prefetch
from tests import ROOT, kept_pool, synthetic
from tests.data.batches.loader_work import (
    end_itself,
    growing,
    note,
    pid_of_step,
    refuse,
    send_big,
    signalled,
    where_jax_would_run,
)

SHAPE = {"row_length": 96, "microbatch_rows": 2, "max_length": 48}


@pytest.fixture(scope="module")
def index(make_index):
    rows = [
        {"prompt": f"Question {i // 2}?", "completion": "Text. " * (i % 5 + 1), "label": i % 2 == 0} for i in range(60)
    ]
    return make_index(rows, max_length=48, max_prompt_length=24)


@pytest.fixture
def schedule(index):
    return synthetic.make_schedule(index, index.sequences("train"), batch_size=8, seed=1, epochs=2, **SHAPE)


def equal(first, second):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def children():
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in found if pid not in kept_pool.process_ids()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_loaders_make_bitwise_the_same_batches_as_a_thread(schedule, num_loaders):
    steps = range(3, schedule.num_steps)
    assert len(steps) == 13
    batches = list(prefetch(schedule.batch, steps, num_loaders=num_loaders))
    assert len(batches) == 13
    assert all(equal(batch, schedule.batch(step)) for step, batch in zip(steps, batches, strict=True))


def test_fewer_steps_than_loaders_are_made_too(schedule):
    assert equal(list(prefetch(schedule.batch, [5], num_loaders=2)), [schedule.batch(5)])
    assert list(prefetch(schedule.batch, [], num_loaders=1)) == []


def test_finish_runs_in_this_process_and_in_order(schedule):
    finished = prefetch(schedule.batch, range(4), num_loaders=2, finish=lambda batch: (os.getpid(), batch.num_matched))
    assert list(finished) == [(os.getpid(), schedule.batch(step).num_matched) for step in range(4)]


def test_a_schedule_is_pickled_without_the_columns_of_its_index(schedule, index):
    travelled = pickle.dumps(schedule)
    assert len(travelled) < len(pickle.dumps(index.manifest)) + 8 * schedule.num_examples + 4096
    copy = pickle.loads(travelled)
    assert isinstance(copy._index.tokens, np.memmap) and equal(copy.batch(7), schedule.batch(7))
    assert copy._index.manifest == index.manifest


def test_loaders_claim_no_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert next(prefetch(where_jax_would_run, range(1), num_loaders=1)) == "cpu"
    assert os.environ["JAX_PLATFORMS"] == "cuda"


def test_a_loader_is_two_steps_ahead_and_no_more(tmp_path):
    made = tmp_path / "made"
    with contextlib.closing(Loaders(functools.partial(note, str(made)), range(100), 2)) as loaders:
        assert next(iter(loaders)) == 0
        deadline = time.monotonic() + 30
        while len(made.read_text().split()) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert sorted(made.read_text().split()) == ["0", "1", "2", "3"]


def test_arrays_of_all_sizes_arrive_unchanged_and_stay_so():
    results = list(prefetch(growing, range(8), num_loaders=1))
    assert equal(results, [growing(step) for step in range(8)])
    results[4]["a"] += 1  # the receiver's own


@pytest.mark.parametrize(("kind", "error", "message"), [
    ("plain", ValueError, "bad row"), ("strange", RuntimeError, "StrangeError: bad"),
])  # fmt: skip
def test_a_loaders_exception_is_raised_in_its_turn_with_its_place(kind, error, message):
    results = prefetch(functools.partial(refuse, kind), range(9), num_loaders=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(error, match=message) as caught:
        next(results)
    assert "in loader 1, while it made the batch of step 3" in caught.value.__notes__[-1]
    assert "def refuse" not in caught.value.__notes__[-1] and ", in refuse" in caught.value.__notes__[-1]
    assert children_are_gone()


def children_are_gone():
    """All except the resource tracker, which `multiprocessing` keeps."""
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children()]
    return not any(b"spawn_main" in command for command in commands)


def test_a_row_that_cannot_be_packed_is_named(schedule, monkeypatch):
    def prompt(self, row):
        if row == 17:
            raise ValueError("spoilt")
        return np.zeros(4, np.int32)

    monkeypatch.setattr(type(schedule._index), "prompt", prompt)
    step = next(step for step in range(schedule.num_steps) if 17 in schedule.step(step).ids)
    with pytest.raises(ValueError, match="spoilt") as caught:
        schedule.batch(step)
    assert caught.value.__notes__[0].endswith("train.jsonl:18")


@pytest.mark.parametrize(("how", "kind", "message"), [
    ("kill", TransientError, r"loader 1 of .*=2 was ended by SIGKILL \(the system does so .* memory runs out\)"),
    ("exit", ConfigError, "loader 1 of .*=2 ended with exit code 7 while it made the batch of step 3"),
])  # fmt: skip
def test_a_killed_loader_is_reported_in_its_turn_and_no_process_is_left(how, kind, message):
    results = prefetch(functools.partial(end_itself, how), range(9), num_loaders=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(kind, match=message) as caught:
        next(results)
    assert "Set config.data.num_loaders lower, or 0 for a thread" in str(caught.value)
    assert children_are_gone()


def test_a_loader_killed_while_it_sends_a_batch_is_reported_too():
    with contextlib.closing(Loaders(send_big, range(9), 1)) as loaders:
        time.sleep(1.5)  # the batch exceeds the pipe's capacity: the loader blocks in the middle of it
        loaders._processes[0].kill()
        with pytest.raises(TransientError, match="was ended by SIGKILL"):
            next(iter(loaders))


def test_loaders_ignore_signals_and_work_until_the_run_ends(schedule):
    results = prefetch(pid_of_step, range(9), num_loaders=2)
    pids = [next(results), next(results)]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert list(results) == [pids[step % 2] for step in range(2, 9)]
    assert children_are_gone()


def test_a_caller_that_stops_early_leaves_no_process():
    results = prefetch(pid_of_step, range(100), num_loaders=2)
    next(results)
    results.close()
    assert children_are_gone()


@pytest.fixture
def ask_loader(monkeypatch):
    """Serves as a loader in this process, and asks for steps from a thread; returns what it replied."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def ask_all(function, steps):
        ours, theirs = multiprocessing.Pipe()
        memories = [_SharedMemory(_anonymous_file()) for _ in range(2)]

        def ask():
            replies = []
            with ours:
                for memory in memories:
                    send_handle(ours, memory.file, os.getpid())
                ours.send(function)
                for turn, step in enumerate(steps):
                    ours.send(step)
                    head, places = ours.recv()
                    assert len(head) < 2000 and all(start % 64 == 0 for start, _ in places)
                    replies.append(ForkingPickler.loads(head, buffers=memories[turn % 2].read(places)))
            return replies

        with concurrent.futures.ThreadPoolExecutor(1) as thread, theirs:
            asking = thread.submit(ask)
            _serve(theirs)  # until the other end is closed
        for memory in memories:
            memory.close()
        return asking.result()

    yield ask_all
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_loader_answers_until_its_run_is_gone_and_keeps_arrays_out_of_the_pipe(ask_loader):
    replies = ask_loader(growing, range(8))
    assert [(error, trace) for _, error, trace in replies] == [(None, "")] * 8
    assert equal([batch for batch, _, _ in replies], [growing(step) for step in range(8)])
    replies[4][0]["a"] += 1  # the receiver's own


@pytest.mark.parametrize("kind, expected", [("plain", ValueError), ("strange", RuntimeError)])
def test_a_loader_lives_on_after_a_step_that_fails(ask_loader, kind, expected):
    replies = ask_loader(functools.partial(refuse, kind), range(2, 5))
    assert [result for result, _, _ in replies] == [2, None, 4]
    _, error, trace = replies[1]
    assert type(error) is expected and "bad" in str(error) and ", in refuse" in trace


def test_a_loader_works_on_when_the_run_is_told_to_stop(ask_loader, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert [result for result, _, _ in ask_loader(signalled, range(2))] == [(0, "cpu"), (1, "cpu")]


RUN = """
import sys
from kto_jax.data.batches.prefetch import prefetch
from tests.data.batches.loader_work import pid_of_step

results = prefetch(pid_of_step, range(1000), num_loaders=2)
print(next(results), next(results), flush=True)
sys.stdin.readline()
if sys.argv[1] == "raise":
    raise KeyboardInterrupt
sys.modules["holder"] = results  # lives until the interpreter has all but ended
"""


@pytest.mark.parametrize(("how", "code"), [("raise", -2), ("hold", 0), ("kill", -9), ("interrupt", -2)])
def test_loaders_end_with_their_run_however_it_ends(how, code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, how]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        if how == "kill":
            process.kill()
        elif how == "interrupt":
            process.send_signal(signal.SIGINT)
        process.communicate("\n" if how in ("raise", "hold") else None, timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_prefetch_keeps_the_order_and_raises_what_the_function_raises():
    def function(step):
        time.sleep(0.01 * (step == 0))
        if step == 4:
            raise ValueError("step 4")
        return threading.current_thread().name, step

    results = prefetch(function, range(9))
    got = [next(results) for _ in range(4)]
    assert [step for _, step in got] == [0, 1, 2, 3] and all(name.startswith("prefetch") for name, _ in got)
    with pytest.raises(ValueError, match="step 4"):
        next(results)


def test_prefetch_works_ahead_by_its_depth_and_stops_when_closed():
    made, third = [], threading.Event()

    def function(step):
        made.append(step)
        if step == 2:
            third.set()

    results = prefetch(function, range(100), depth=3)
    next(results)
    assert third.wait(60)
    results.close()  # Waits for the thread.
    assert made == [0, 1, 2] and not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
