import concurrent.futures
import hashlib
import os
import time

import pytest

from kto_jax.storage import digests
from kto_jax.storage.digests import file_digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settled(path, content, seconds=3600.0):
    """A file that was last written so many seconds ago."""
    path.write_bytes(content)
    moment = time.time() - seconds
    os.utime(path, (moment, moment))
    return path


def replaced_in_place(path, content):
    """Other bytes under the same size, time of writing and inode, as some copying programs leave them."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_ino == status.st_ino


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def no_wait(monkeypatch):
    """Files need not have rested before they are remembered: nobody can set back the time of their last change."""
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1)


def test_a_file_that_has_not_changed_is_hashed_once(tmp_path, monkeypatch, no_wait):
    path = settled(tmp_path / "rows", b"one")
    assert file_digest(path) == digest_of(b"one")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256", lambda file: "hashed again")
        assert file_digest(path) == digest_of(b"one")
        path.touch()
        assert file_digest(path) == "hashed again"


def test_changed_bytes_with_the_old_modification_time_are_hashed_again(tmp_path, no_wait):
    path = settled(tmp_path / "rows", b"one")
    assert file_digest(path) == digest_of(b"one")
    replaced_in_place(path, b"two")
    assert file_digest(path) == digest_of(b"two")


def test_a_digest_is_that_of_the_file_behind_a_link(tmp_path, no_wait):
    first, second = settled(tmp_path / "first", b"one"), settled(tmp_path / "second", b"two")
    link = tmp_path / "link"
    link.symlink_to(first)
    assert file_digest(link) == digest_of(b"one")
    link.unlink()
    link.symlink_to(second)
    assert file_digest(link) == digest_of(b"two")


def test_a_changed_file_is_hashed_again(tmp_path, no_wait):
    path = settled(tmp_path / "rows", b"one")
    assert file_digest(path) == digest_of(b"one")
    settled(path, b"two", seconds=1800)
    assert file_digest(path) == digest_of(b"two")


@pytest.mark.parametrize("seconds", [0.0, 3600.0, -3600.0])
def test_a_file_written_just_now_is_not_remembered(tmp_path, cache, seconds):
    path = settled(tmp_path / "rows", b"one", seconds)
    assert file_digest(path) == digest_of(b"one")
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_a_file_that_replaces_another_is_hashed_again(tmp_path, no_wait):
    path, other = settled(tmp_path / "rows", b"one"), settled(tmp_path / "other", b"two")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    assert file_digest(path) == digest_of(b"one")
    other.replace(path)
    assert file_digest(path) == digest_of(b"two")


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch, no_wait):
    path = settled(tmp_path / "rows", b"one")
    before, hashed = path.stat().st_mtime_ns, digests.sha256
    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256", lambda file: hashed(settled(file, b"two", seconds=1800)))
        file_digest(path)
    path.write_bytes(b"one")
    os.utime(path, ns=(before, before))
    assert file_digest(path) == digest_of(b"one")


def test_a_remembered_digest_that_is_cut_is_made_again(tmp_path, cache, no_wait):
    path = settled(tmp_path / "rows", b"one")
    file_digest(path)
    (remembered,) = [file for file in cache.rglob("*") if file.is_file()]
    remembered.write_text("123")
    assert file_digest(path) == digest_of(b"one") and remembered.read_text() == digest_of(b"one")


def test_a_digest_needs_no_cache_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(settled(tmp_path / "a file", b"")))
    path = settled(tmp_path / "rows", b"one")
    assert file_digest(path) == digest_of(b"one") == file_digest(path)


def test_many_that_hash_one_file_at_once_agree_and_leave_one_file(tmp_path, cache, no_wait):
    path = settled(tmp_path / "rows", b"x" * 5_000_000)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert set(threads.map(file_digest, [path] * 32)) == {digest_of(b"x" * 5_000_000)}
    assert len([file for file in cache.rglob("*") if file.is_file()]) == 1
