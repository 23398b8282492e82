"""Processes that tokenize, and one that is killed."""

import os
import signal

import pytest

from kto_jax.config import TransientError
from kto_jax.data.workers import Workers, _call, keep_workers


def end_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise KeyError("no worker was killed")


def test_a_killed_worker_is_a_failure_that_running_again_may_cure():
    message = r"a worker process was killed .* Run the same command again"
    with pytest.raises(TransientError, match=message), Workers(1) as workers:
        workers.submit(end_itself).result()


def test_what_a_function_raises_in_a_worker_is_raised_as_it_is():
    with pytest.raises(KeyError, match="no worker was killed"), Workers(1) as workers:
        workers.submit(fail).result()


known = None


def know(what):
    global known
    known = what


def recall():
    return os.getpid(), known


def test_kept_workers_make_the_start_of_the_pool_that_asks_them():
    with keep_workers():
        answers = []
        for what in ("a", "b", "b"):
            with Workers(1, know, what) as workers:
                answers += [workers.submit(recall).result() for _ in range(2)]
    assert [what for _, what in answers] == ["a", "a", "b", "b", "b", "b"] and len({pid for pid, _ in answers}) == 1
    with Workers(1, know, "c") as workers:
        assert workers.submit(recall).result()[0] != answers[0][0], "they end with the context"


def test_kept_workers_that_were_killed_are_replaced():
    with keep_workers():
        with pytest.raises(TransientError), Workers(1) as workers:
            workers.submit(end_itself).result()
        with Workers(1, know, "d") as workers:
            assert workers.submit(recall).result()[1] == "d"


def note_start(path, what):
    with open(path, "a") as file:
        file.write(what)


def test_a_worker_makes_the_start_of_another_pool_and_no_start_twice(monkeypatch, tmp_path):
    monkeypatch.setattr("kto_jax.data.workers._begun", None)
    path = str(tmp_path / "starts")
    begins = [(note_start, (path, what)) for what in "aaba"] + [(None, ()), (note_start, (path, "a"))]
    assert [_call(begin, abs, -number) for number, begin in enumerate(begins)] == list(range(6))
    assert (tmp_path / "starts").read_text() == "abaa"
