"""When processes connect to each other; that they do is in tests/training/test_processes.py."""

import socket
import threading

import pytest

from kto_jax.config import ConfigError, ProcessesConfig, TransientError
from kto_jax.devices import processes

NONE = dict.fromkeys(
    ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS")
)
GIVEN = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}


@pytest.fixture
def join(monkeypatch):
    """Calls processes.join in an environment; returns what jax.distributed.initialize was called with, if it was."""

    def join(variables, *, error=None, has_tpu=False, **config):
        calls = []

        def initialize(*arguments, **timeouts):
            calls.append(arguments)
            assert set(timeouts.values()) == {7}
            if error:
                raise error

        for name, value in (NONE | variables).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        monkeypatch.setattr("kto_jax.devices.processes.jax.distributed.initialize", initialize)
        monkeypatch.setattr("kto_jax.devices.processes._wait_for_first_process", lambda address, timeout: None)
        monkeypatch.setattr("kto_jax.devices.processes.glob.glob", lambda pattern: ["/dev/accel0"] * has_tpu)
        monkeypatch.setattr(
            "kto_jax.devices.processes.importlib.util.find_spec", lambda name: "libtpu" if has_tpu else None
        )
        processes.join(ProcessesConfig(timeout_seconds=7, **config))
        return calls

    return join


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "8"}, {"SLURM_STEP_NODELIST": "node1"}])
def test_one_process_waits_for_no_other(join, variables):
    assert join(variables) == []


def test_processes_are_found_as_the_environment_says(join):
    assert join(GIVEN) == [("host:1", 4, 3)]


def test_in_a_slurm_step_and_on_a_tpu_jax_finds_them(join):
    assert join(STEP) == [(None, None, None)]
    assert join({}, has_tpu=True) == [(None, None, None)]


def test_a_tpu_outside_of_any_cluster_is_used_alone(join):
    assert len(join({}, has_tpu=True, error=ValueError("coordinator_address should be defined."))) == 1


def test_one_process_can_be_requested(join):
    assert join(STEP, has_tpu=True, count=1) == []


@pytest.mark.parametrize("variables", [GIVEN, STEP])
def test_processes_that_do_not_come_are_missed(join, variables):
    with pytest.raises(TransientError, match=r"cannot connect: no barrier\. Each needs .* raise config.processes"):
        join(variables, error=RuntimeError("no barrier.\nand more"))


def test_fewer_processes_than_there_must_be_are_refused(join):
    with pytest.raises(ConfigError, match=r"1 processes were started, and config\.processes\.count=2"):
        join({}, count=2)


def test_with_one_process_broadcasts_and_gathers_return_its_own_values():
    assert processes.exchange_text("word") == ["word"]
    assert processes.broadcast_bool(True) and not processes.broadcast_bool(False)
    assert processes.broadcast_int(7) == 7
    assert processes.call_on_all(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        processes.call_on_all(lambda: 1 / 0)


@pytest.mark.parametrize("variables, lacking", [
    ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES"),
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
    (GIVEN | {"JAX_PROCESS_ID": "-1"}, "nothing"),
    (GIVEN | {"JAX_NUM_PROCESSES": "four"}, "nothing"),
])  # fmt: skip
def test_variables_that_are_incomplete_or_no_numbers_are_refused(join, variables, lacking):
    with pytest.raises(ConfigError, match=f"and lacks {lacking}. Several processes need .* Set all three, or none"):
        join(variables)


def test_a_process_waits_until_the_first_one_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    came = threading.Event()

    def listen():
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(60)
            server.accept()[0].close()
            came.set()

    timer = threading.Timer(0.1, listen)
    timer.start()
    processes._wait_for_first_process(f"127.0.0.1:{port}", timeout=60)
    assert came.wait(60)
    timer.join()


@pytest.mark.parametrize("address", ["127.0.0.1:{free}", "127.0.0.1:port", "127.0.0.1:99999999"])
def test_a_first_process_that_does_not_answer_is_named_by_its_address(address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = address.format(free=server.getsockname()[1])
    expected = rf"does not answer at JAX_COORDINATOR_ADDRESS={address} \(.+\)\. .* waited 0 s\. Start all again"
    with pytest.raises(TransientError, match=expected):
        processes._wait_for_first_process(address, timeout=0)
