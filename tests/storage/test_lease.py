"""The lock of a folder in a bucket, against a server on this machine."""

import json
import subprocess
import sys

import pytest

from kto_jax.config import TransientError
from kto_jax.storage import lease
from kto_jax.storage.bucket import Bucket
from kto_jax.storage.lease import acquire
from tests.fake_buckets import make_bucket


@pytest.fixture(scope="module")
def gcs():
    return make_bucket("leases")


@pytest.fixture
def bucket(gcs, request, monkeypatch):
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0)
    return Bucket(f"{gcs}/{request.node.name}")


def holder(bucket):
    (name,) = bucket.versions(".lease/")
    return name, json.loads(bucket.read(name))


def elsewhere(monkeypatch):
    """From now on this process is on another machine."""
    monkeypatch.setattr(lease, "_machine", lambda: "another")


def when_it_looks(monkeypatch, then):
    """Calls a function the first time that the process that waits reads the lease again."""
    calls = iter([then])
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: next(calls, lambda: None)())


def test_a_released_folder_is_taken_at_once(bucket):
    acquire(bucket).release()
    acquire(bucket)
    assert holder(bucket)[0] == ".lease/000002.json"


def test_a_lease_that_is_renewed_is_refused_with_host_process_and_time(bucket, monkeypatch):
    held = acquire(bucket)
    terms = holder(bucket)[1]
    elsewhere(monkeypatch)
    when_it_looks(monkeypatch, held.renew)
    expected = f"in use by process {terms['pid']} on {terms['host']}, which began at {terms['since']}. One run may"
    with pytest.raises(TransientError) as error:
        acquire(bucket)
    assert expected in str(error.value)
    held.check()


def test_a_lease_without_a_sign_of_its_holder_expires_and_the_old_holder_notices(bucket, monkeypatch, capsys):
    held = acquire(bucket)
    elsewhere(monkeypatch)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.05)
    new = acquire(bucket)
    assert "taking it over" in capsys.readouterr().err
    held.renew()
    with pytest.raises(TransientError, match="was taken over by another process"):
        held.check()
    held.release()
    assert holder(bucket)[1]["is_released"] is False
    new.check()


def test_a_lease_that_is_released_while_another_process_waits_is_taken(bucket, monkeypatch):
    held = acquire(bucket)
    elsewhere(monkeypatch)
    when_it_looks(monkeypatch, held.release)
    acquire(bucket)


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(bucket):
    program = (
        f"from kto_jax.storage.bucket import Bucket; from kto_jax.storage.lease import acquire; "
        f"acquire(Bucket({bucket.url!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert holder(bucket)[1]["is_released"] is False
    acquire(bucket)


def test_of_two_processes_that_see_a_free_folder_one_gets_it(bucket, monkeypatch):
    create, others = Bucket.create, []

    def beaten(self, name, content):
        if not others:
            others.append(create(self, name, b'{"is_released": true}'))
        return create(self, name, content)

    monkeypatch.setattr(Bucket, "create", beaten)
    acquire(bucket)
    assert others == [True] and holder(bucket)[0] == ".lease/000002.json"


def test_a_lease_that_is_not_json_counts_as_held_until_it_expires(bucket, monkeypatch):
    bucket.write(".lease/000001.json", b"half")
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.05)
    acquire(bucket)
    assert holder(bucket)[0] == ".lease/000002.json"
