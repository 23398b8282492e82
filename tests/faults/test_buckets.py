"""F7, F9 in buckets: a real run behind a proxy that answers with errors, slowly or not at all; signals meanwhile."""

import contextlib
import signal
import time

import pytest

from kto_jax.storage.bucket import Bucket
from tests.commands.test_train_in_bucket import cache, figures, finish, here, on_disk, start, start_processes  # noqa: F401
from tests.fake_buckets import environment, serve_gcs
from tests.unsteady_proxy import UnsteadyProxy

IMPATIENT = """
import asyncio, runpy, types
import gcsfs.retry
from kto_jax.storage import bucket, bucket_watch

gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
bucket.PATIENCE_SECONDS, bucket._ANSWER_SECONDS = {patience}, 1
bucket_watch.STOP_SECONDS, bucket_watch.AWAY_SECONDS = {stop}, {patience} + 20
runpy.run_module("kto_jax.train", run_name="__main__", alter_sys=True)
"""
"""Training with shorter waits: the client's pauses, its limit for an answer, and those of the package."""
MODES = [503, pytest.param(429, marks=pytest.mark.exhaustive), pytest.param("silent", marks=pytest.mark.exhaustive),
         pytest.param("reset", marks=pytest.mark.exhaustive)]  # fmt: skip


class Place:
    """The folder of a run in a bucket behind a proxy."""

    def __init__(self, folder):
        self.proxy, self._folder = UnsteadyProxy(), folder
        server, self.proxy.upstream = serve_gcs(folder / "server", external_url=self.proxy.url)
        (folder / "server/runs").mkdir()
        self.path = folder / "server/runs/mine"
        self.close = lambda: (self.proxy.close(), server.kill(), server.wait())

    def start(self, *arguments, patience=600, stop=3):
        """Starts the run, with a save after every step."""
        program = ("-c", IMPATIENT.format(patience=patience, stop=stop))
        arguments = ("--config.checkpoint.every=1", "--config.watch.heartbeat_seconds=0", *arguments)
        settings = environment(self.proxy.url)
        return start(Bucket("gs://runs/mine"), self._folder, *arguments, program=program, **settings)

    def wait_for_step(self, step, process):
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if self.newest() >= step:
                return
            time.sleep(0.01)
        raise AssertionError(process.communicate()[1])

    def wait_for_rows(self, number, process):
        """Waits until the working copy has this many rows of metrics."""
        while process.poll() is None:
            for copy in (self._folder / "TMPDIR").glob("kto_jax-*/mine/metrics.jsonl"):
                if copy.read_text().count("\n") >= number:
                    return
            time.sleep(0.005)
        raise AssertionError(process.communicate()[1])

    def newest(self):
        """The newest checkpoint that is whole and was read back."""
        found = (self.path / "checkpoints").glob("*/VERIFIED")
        return max((int(path.parent.name) for path in found if path.parent.name.isdecimal()), default=0)


@pytest.fixture
def place(tmp_path):
    with contextlib.closing(Place(tmp_path)) as made:
        yield made


def assert_equal_to(on_disk, place):  # noqa: F811
    assert figures((place.path / "metrics.jsonl").read_text()) == figures((on_disk / "metrics.jsonl").read_text())
    policy = "policy/model.safetensors"
    assert (place.path / policy).read_bytes() == (on_disk / policy).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, pytest.param("slow", marks=pytest.mark.exhaustive)])
def test_a_bucket_that_fails_for_a_while_costs_a_run_nothing_but_time(mode, place, on_disk):  # noqa: F811
    process = place.start()
    place.wait_for_step(2, process)
    place.proxy.set(mode)
    assert place.proxy.wait_for_failures(8 if mode != "slow" else 3)
    place.proxy.set("pass")
    message = process.communicate()[1]
    assert process.returncode == 0, message
    assert "Traceback" not in message
    assert_equal_to(on_disk, place)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
def test_a_bucket_that_stays_away_ends_the_run_with_75_and_the_run_resumes(mode, place, on_disk):  # noqa: F811
    process = place.start(patience=4)
    place.wait_for_step(2, process)
    place.proxy.set(mode)
    message = process.communicate(timeout=200)[1]
    assert process.returncode == 75, message
    assert "Traceback" not in message
    assert "error: gs://runs/mine" in message
    newest = place.newest()
    place.proxy.set("pass")
    process = place.start()
    message = process.communicate()[1]
    assert process.returncode == 0, message
    assert f"continuing after step {newest}" in message
    assert_equal_to(on_disk, place)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["silent", pytest.param(503, marks=pytest.mark.exhaustive)])
def test_a_signal_to_a_run_that_waits_for_its_bucket_ends_it_soon(mode, place, on_disk):  # noqa: F811
    process = place.start()
    place.wait_for_step(2, process)
    place.proxy.set(mode)
    assert place.proxy.wait_for_failures(8)
    process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    message = process.communicate(timeout=200)[1]
    assert process.returncode == 75, message
    assert "error: gs://runs/mine has not answered for" in message and "after a signal to stop" in message
    assert time.monotonic() - signalled < 30
    assert not list((place._folder / "TMPDIR").glob("kto_jax-*"))
    place.proxy.set("pass")
    process = place.start()
    assert process.communicate() and process.returncode == 0
    assert_equal_to(on_disk, place)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_signal_to_one_of_two_processes_that_wait_for_their_bucket_ends_both_soon(number, place):
    given = {"program": ("-c", IMPATIENT.format(patience=40, stop=3)), **environment(place.proxy.url)}
    arguments = ("--config.checkpoint.every=1", "--config.watch.heartbeat_seconds=0")
    processes = start_processes(Bucket("gs://runs/mine"), place._folder, 2, *arguments, **given)
    place.wait_for_step(2, processes[0])
    place.proxy.set("silent")
    assert place.proxy.wait_for_failures(8)
    processes[number].send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    codes, messages = finish(processes)
    assert codes[0] == 75 and codes[1] in (75, -signal.SIGABRT), "\n".join(messages)
    assert "error: gs://runs/mine has not answered for" in messages[0] and "after a signal to stop" in messages[0]
    assert time.monotonic() - signalled < 90  # the other process misses its heartbeat


@pytest.mark.slow
def test_signals_to_a_run_in_a_bucket_leave_a_whole_checkpoint_of_the_last_step(place, on_disk):  # noqa: F811
    # A busy machine answers late; how long the run waits for an answer is the matter of the tests above.
    process = place.start("--config.checkpoint.every=100", stop=600)
    place.wait_for_rows(2, process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    message = process.communicate()[1]
    assert process.returncode == 75, message
    assert 2 <= place.newest() == len(figures((place.path / "metrics.jsonl").read_text())) < 12, message
    process = place.start("--config.checkpoint.every=100")
    assert process.communicate() and process.returncode == 0
    assert_equal_to(on_disk, place)
