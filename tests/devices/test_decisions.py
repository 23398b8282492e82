"""Decisions of two processes over JAX's own coordination service; a thread stands for each process."""

import itertools
import socket
import threading

import jax
import pytest
from jax._src.lib import _jax

from kto_jax.config import ConfigError, TransientError
from kto_jax.devices import processes

WAIT = 60


class OfThread(threading.local):
    """What each process has of its own: its number, its connection, and how many exchanges it has made."""

    number, client, turns = 0, None, None

    def __next__(self):
        return next(self.turns)


@pytest.fixture
def together(monkeypatch):
    """Calls a function in both processes, with the number of the process; returns what each returns or raises."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, 2)
    clients = [_jax.get_distributed_runtime_client(address, number, shutdown_timeout=WAIT) for number in range(2)]
    own, turns = OfThread(), [itertools.count(), itertools.count()]
    monkeypatch.setattr(processes, "_TURNS", own)
    monkeypatch.setattr(processes, "_service", lambda: own.client)
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: own.number)

    def in_both(function):
        found = [None, None]

        def run(number):
            own.number, own.client, own.turns = number, clients[number], turns[number]
            try:
                found[number] = function(number)
            except Exception as error:
                found[number] = error

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive(), "a process waits for ever"
        return found

    in_both(lambda number: clients[number].connect())
    yield in_both
    in_both(lambda number: clients[number].shutdown())
    service.shutdown()


def test_words_arrive_in_the_order_of_the_processes_and_exchanges_do_not_mix(together):
    words = together(lambda number: [processes.exchange_text(f"{number}{turn}") for turn in "ab"])
    assert words == [[["0a", "1a"], ["0b", "1b"]]] * 2


def test_the_first_process_decides(together):
    def decide(number):
        kept = processes.broadcast_bool(number == 0), processes.broadcast_bool(number == 1)
        return kept, processes.broadcast_int(10 + number), processes.on_first(lambda: f"by {number}")

    assert together(decide) == [((True, False), 10, "by 0"), ((True, False), 10, None)]


def test_the_first_process_does_not_wait_for_those_that_take_its_number(together):
    sent = threading.Event()

    def take(number):
        if number:
            assert sent.wait(WAIT)
        found = processes.broadcast_int(7 - number)
        sent.set()
        return found

    assert together(take) == [7, 7]


@pytest.mark.parametrize("error, kind", [
    (OSError("the disk is full"), ConfigError), (TransientError("the bucket is away"), TransientError),
])  # fmt: skip
def test_what_fails_in_one_process_fails_in_all_and_the_others_name_it(together, error, kind):
    def work(number):
        if number:
            raise error
        return "done"

    first, second = together(lambda number: processes.call_on_all(lambda: work(number)))
    assert second is error and type(first) is kind
    assert str(first) == "process 1 of 2 has failed. All processes are needed. See its own message."
    # The next decision is about what comes next.
    assert together(lambda number: processes.exchange_text(str(number))) == [["0", "1"]] * 2


def test_a_wait_outlasts_the_deadlines_of_the_service(together, monkeypatch):
    has_waited = threading.Event()

    class Impatient:
        """A connection whose waits end at once."""

        def __init__(self, client):
            self.client = client

        def blocking_key_value_get(self, key, milliseconds):
            try:
                return self.client.blocking_key_value_get(key, 1)
            finally:
                has_waited.set()

        def __getattr__(self, name):
            return getattr(self.client, name)

    service = processes._service
    monkeypatch.setattr(processes, "_service", lambda: Impatient(service()))

    def exchange(number):
        if number:
            assert has_waited.wait(WAIT)
        return processes.exchange_text(str(number))

    assert together(exchange) == [["0", "1"]] * 2


def test_a_sigterm_to_one_process_is_seen_by_all(together):
    assert together(lambda number: processes.any_was_told_to_stop()) == [False, False]
    # As JAX's preemption service does in the process that got the signal.
    together(lambda number: number and processes._service().key_value_set(processes._NOTICE, "/job:jax/task:1"))
    assert together(lambda number: processes.any_was_told_to_stop()) == [True, True]


def test_the_process_that_does_not_answer_is_lost(together):
    assert together(lambda number: processes._unresponsive(0.2) if number else None) == [None, [0]]
    # Late, but it has come; to say twice that a process is alive is no error.
    assert together(lambda number: processes._unresponsive(WAIT)) == [[], []]


def test_the_death_of_a_process_ends_the_others_at_once_with_its_code(together, monkeypatch, capfd):
    class EndedError(Exception):
        pass

    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(processes.os, "_exit", end)

    def collective(number):
        if number:
            with processes.exit_if_one_is_lost(75, timeout=0.2):
                raise ValueError("Gloo all-reduce failed\nat rank 1")

    ended = together(collective)[1]
    assert isinstance(ended, EndedError) and ended.args == (75,)
    assert capfd.readouterr().err == (
        "error: process 0 of 2 is lost (Gloo all-reduce failed). All processes are needed. Run the same command again "
        "to resume.\n"
    )


@pytest.mark.parametrize("error", [ValueError("a bad row"), ConfigError("a bad flag")])
def test_an_error_while_all_processes_answer_is_raised_as_it_is(together, error):
    def fail(number):
        with processes.exit_if_one_is_lost(75, timeout=WAIT):
            raise error

    assert together(fail) == [error, error]
