"""Folders in buckets, against a server on this machine."""

import asyncio
import errno
from types import SimpleNamespace

import aiohttp
import fsspec.config
import gcsfs.retry
import pytest
import requests

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage import bucket as bucket_module
from kto_jax.storage.bucket import Bucket, is_bucket, may_pass
from tests.fake_buckets import make_bucket, start_gcs
from tests.unsteady_proxy import UnsteadyProxy


@pytest.fixture(scope="module")
def gcs():
    return make_bucket("files")


@pytest.fixture(scope="module")
def s3():
    return make_bucket("files", "s3")


@pytest.fixture(params=["gcs", "s3"])
def bucket(request):
    return Bucket(f"{request.getfixturevalue(request.param)}/{request.node.originalname}")


class Failing:
    """A file system whose first answers are errors."""

    def __init__(self, errors):
        self.errors = list(errors)

    def cat_file(self, path):
        if self.errors:
            raise self.errors.pop(0)
        return b"here"


@pytest.fixture
def failing(bucket, monkeypatch):
    pauses = []
    monkeypatch.setattr(bucket_module.time, "sleep", pauses.append)

    def fail(*errors):
        bucket._files = Failing(errors)
        return bucket, pauses

    return fail


def test_what_is_written_is_listed_and_read_and_removed(bucket, tmp_path):
    bucket.write("a", b"one")
    (tmp_path / "file").write_bytes(b"two")
    bucket.upload(tmp_path / "file", "b/c")
    assert sorted(bucket.versions()) == ["a", "b/c"]
    assert list(bucket.versions("b/")) == ["b/c"]
    assert bucket.read("a") == b"one"
    bucket.download("b/c", tmp_path / "new/file")
    assert (tmp_path / "new/file").read_bytes() == b"two"
    bucket.remove("a")
    bucket.remove("a")
    assert bucket.read("a") is None and list(bucket.versions()) == ["b/c"]


def test_a_version_changes_with_the_content_and_at_no_other_time(bucket):
    bucket.write("a", b"one")
    first = bucket.versions()
    assert bucket.versions() == first
    bucket.write("a", b"two")
    assert bucket.versions()["a"] != first["a"]


def test_one_of_two_that_create_a_file_succeeds(bucket):
    assert bucket.create("a", b"one")
    assert not bucket.create("a", b"two")
    assert bucket.create("a", b"one")  # the answer to its own first try was lost
    assert bucket.read("a") == b"one"


def test_a_folder_that_does_not_exist_holds_no_files(bucket):
    assert bucket.versions() == {}


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_bucket_that_does_not_exist_is_refused_when_it_is_written_to(kind, gcs, s3):
    with pytest.raises(ConfigError, match=rf"{kind}://none/run cannot be written to \(a\): FileNotFoundError.*exists"):
        Bucket(f"{kind}://none/run").write("a", b"")


def test_a_url_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match="gs://bucket/ is no folder in a bucket"):
        Bucket("gs://bucket/")


def test_a_failure_that_may_pass_is_reported_and_tried_again_with_longer_pauses(failing, capsys):
    bucket, pauses = failing(*[requests.exceptions.ConnectionError("gone")] * 3)
    assert bucket.read("a") == b"here"
    assert pauses == [2, 4, 8]
    assert capsys.readouterr().err.count("cannot be read (a): ConnectionError: gone; trying again in") == 3


def test_a_bucket_that_stays_away_ends_the_wait_after_the_limit(failing, monkeypatch):
    bucket, pauses = failing(*[TimeoutError()] * 100)
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(bucket_module.time, "monotonic", lambda: next(clock))
    with pytest.raises(TransientError, match=r"could not be read \(a\) for 550 s: TimeoutError"):
        bucket.read("a")
    assert len(pauses) == 10


def test_a_process_that_was_asked_to_stop_cuts_its_pauses_short(failing):
    bucket, pauses = failing(*[TimeoutError()] * 3)
    bucket._hurry = lambda: True
    assert bucket.read("a") == b"here"
    assert pauses == [1, 1, 1]


def test_a_bucket_counts_as_away_from_the_method_that_gives_up_to_the_next_answer(failing):
    bucket, _ = failing(TimeoutError())
    bucket._patience = 0
    assert not bucket.is_away
    with pytest.raises(TransientError):
        bucket.read("a")
    assert bucket.is_away
    bucket.read("a")
    assert not bucket.is_away


@pytest.fixture
def proxied(monkeypatch, gcs):
    """A bucket behind a proxy, whose client does not pause between its own six tries."""
    proxy = UnsteadyProxy(seconds=0.2)
    proxy.upstream = start_gcs()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    monkeypatch.setattr(bucket_module, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(bucket_module, "_SLOW_SECONDS", 0.05)
    conf = {"gcs": {}}
    monkeypatch.setattr(fsspec.config, "conf", conf)
    bucket = Bucket(f"{gcs}/proxied")
    bucket._files = bucket_module._file_system.__wrapped__("gs")
    yield bucket, proxy
    proxy.close()


@pytest.mark.parametrize("mode, why", [
    (503, "HttpError: the proxy fails, 503"), (429, "HttpError: the proxy fails, 429"), (500, "HttpError"),
    ("reset", "ServerDisconnectedError"), ("silent", "FSTimeoutError"),
])  # fmt: skip
def test_a_server_that_fails_is_asked_again_until_it_answers(mode, why, proxied, monkeypatch, capsys):
    bucket, proxy = proxied
    monkeypatch.setattr(bucket_module.time, "sleep", lambda seconds: proxy.set("pass"))
    for act in (lambda: bucket.write("a", b"1"), lambda: bucket.read("a") == b"1", bucket.versions):
        before, _ = proxy.failed, proxy.set(mode)
        assert act() in (None, True, {"a": bucket.versions()["a"]})
        # The client's own tries; below it aiohttp repeats what a closed connection has lost.
        assert proxy.failed - before in ((6,) if mode != "reset" else range(6, 13))
    assert capsys.readouterr().err.count(f": {why}") == 3


def test_a_slow_server_is_waited_for_and_reported(proxied, monkeypatch, capsys):
    bucket, proxy = proxied
    monkeypatch.setattr(fsspec.config, "conf", {"gcs": {"requests_timeout": aiohttp.ClientTimeout(total=100)}})
    bucket._files = bucket_module._file_system.__wrapped__("gs")
    proxy.set("slow")
    bucket.write("a", b"1")
    assert proxy.failed == 1
    assert "is slow: it has not been written to (a) for" in capsys.readouterr().err


def test_a_failure_that_stays_is_refused_at_once(failing):
    bucket, pauses = failing(PermissionError("no"))
    with pytest.raises(ConfigError, match=r"cannot be read \(a\): PermissionError: no.*credentials"):
        bucket.read("a")
    assert not pauses


class HttpError(Exception):
    def __init__(self, code):
        self.code = code


@pytest.mark.parametrize("error, expected", [
    (HttpError(429), True), (HttpError(503), True), (HttpError(401), False), (OSError("Forbidden: x"), False),
    (OSError(errno.EBUSY, "slow down"), True), (OSError(errno.ENOSPC, "disk full"), False), (KeyError("x"), False),
    (ValueError("UNAVAILABLE: curl"), True), (ValueError("a number"), False), (ConnectionResetError(), True),
])  # fmt: skip
def test_only_failures_that_time_may_cure_are_tried_again(error, expected):
    assert may_pass(error) == expected


def test_only_urls_of_buckets_are_buckets():
    assert is_bucket("gs://a/b") and is_bucket("s3://a/b")
    assert not is_bucket("runs/mine") and not is_bucket("https://a/b") and not is_bucket("gs")
