"""Indices that one host builds and the others copy, in real processes; and stores with missing or damaged files."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry as imported

from kto_jax.config import ConfigError, DataConfig, TransientError
from kto_jax.data.index import builder
from kto_jax.data.index import index as index_module
from kto_jax.data.index import shared_store as store_module
from kto_jax.data.index.index import build_index
from kto_jax.data.index.shared_store import IndexStore
from tests import ROOT
from tests.data.conftest import InProcessWorkers

ROWS = [{"prompt": f"Question {i // 2}?", "completion": f"Text {i}.", "label": i % 3 > 0} for i in range(24)]
HOST = """
import json, sys, time
from pathlib import Path
from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.index import builder, shared_store as store
from kto_jax.data.index.index import build_index
from kto_jax.data.tokens.tokenizer import TokenizerInfo

rows, indices, url, info, builds, pause = sys.argv[1:]
store._POLL_SECONDS, store._SIGN_SECONDS, store._PATIENCE_SECONDS = 0.05, 0.1, 20
write, add_sources = store.IndexStore._write, builder.Builder.add_sources

def slow_write(self, key, name, content):
    write(self, key, name, content)
    if name != "building.json":
        print("wrote", name, flush=True)
        time.sleep(float(pause))

def telling(self):
    print("building", flush=True)
    add_sources(self)

store.IndexStore._write, builder.Builder.add_sources = slow_write, telling
tokenizer = TokenizerInfo(**json.loads(info) | {"directory": Path(json.loads(info)["directory"])})
data = DataConfig(train=rows, num_workers=1, holdout=0.0, index_store=url)
try:
    index = build_index(data, tokenizer, vocab_size=512, directory=Path(indices), builds=builds == "builds")
except ConfigError as error:
    sys.exit(f"refused: {error}")
print("digest", index.manifest["content_sha256"], index.place(3))
"""


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def host(tmp_path, rows, tokenizer):
    """Starts a host: a process with its own disk and its own path of the feedback."""
    info = json.dumps(
        {**vars(dataclasses.replace(tokenizer, has_chat_template=False))}
        | {"directory": str(tokenizer.directory), "rendering": None}
    )
    started = []

    def run(name, *, builds=True, url=None, pause=0.0):
        disk = tmp_path / name
        disk.mkdir(exist_ok=True)
        shutil.copy(rows, disk / "rows.jsonl")
        arguments = [str(disk / "rows.jsonl"), str(disk / "indices"), url or str(tmp_path / "store"), info]
        command = [sys.executable, "-c", HOST, *arguments, "builds" if builds else "waits", str(pause)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "KTO_JAX_CACHE": str(disk / "cache")}
        started.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    """A host's standard output, and its messages."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.splitlines(), err


@pytest.mark.nightly
def test_one_host_builds_and_publishes_and_the_others_wait_and_copy(host, tmp_path):
    waiting = host("second", builds=False)
    while "waiting for the first process" not in waiting.stderr.readline():
        pass
    built, said = finish(host("first", pause=0.05))
    copied, also_said = finish(waiting)
    assert built[0] == "building" and "publishing the index to" in said
    assert copied == [built[-1].replace("first", "second").replace(str(tmp_path / "second"), str(tmp_path / "first"))]
    assert "copying the index from" in also_said
    (first,), (second,) = ((tmp_path / name / "indices").iterdir() for name in ("first", "second"))
    assert first.name == second.name and sorted(os.listdir(first)) == sorted(os.listdir(second))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in os.listdir(first))
    (folder,) = (tmp_path / "store").iterdir()
    assert not [path.name for path in folder.iterdir() if "partial" in path.name or path.name == "building.json"]
    later, _ = finish(host("third"))
    assert later[0].startswith("digest"), "a later run builds nothing and writes nothing"


def test_who_does_not_build_copies_what_was_published_and_asks_the_store_only_once(
    rows, tokenizer, tmp_path, monkeypatch, capsys
):
    data = DataConfig(train=str(rows), num_workers=1, holdout=0.0, index_store=str(tmp_path / "store"))

    def index_of(name, **options):
        return build_index(data, tokenizer, vocab_size=512, directory=tmp_path / name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "Workers", InProcessWorkers)
        built = index_of("first")
    assert "publishing the index to" in capsys.readouterr().err
    monkeypatch.setattr(index_module, "Builder", None)  # building would fail
    copied = index_of("second", builds=False)
    said = capsys.readouterr().err
    assert "waiting for the first process" in said and "copying the index from" in said
    assert copied.directory != built.directory and copied.manifest == built.manifest
    assert (copied.directory / "tokens.bin").read_bytes() == (built.directory / "tokens.bin").read_bytes()
    assert index_of("third").manifest == built.manifest
    assert "copying the index from" in capsys.readouterr().err and not list((tmp_path / "store").rglob("building*"))
    # What is here already is opened without the store.
    shutil.rmtree(tmp_path / "store")
    assert index_of("second", builds=False).manifest == built.manifest and capsys.readouterr().err == ""


@pytest.mark.nightly
def test_a_host_killed_while_publishing_leaves_nothing_readable_and_publishes_again(host, tmp_path):
    killed = host("first", pause=0.5)
    for _ in range(4):  # building, and three files of it
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (folder,) = (tmp_path / "store").iterdir()
    assert len(list(folder.iterdir())) >= 3 and not (folder / "contents.json").exists()
    waiting = host("second", builds=False)
    again, _ = finish(host("first"))
    assert "building" not in again and again[-2] == "wrote contents.json"
    assert finish(waiting)[0][0].split()[:2] == again[-1].split()[:2]


def test_a_host_with_an_empty_disk_copies_the_index_from_the_store(host, tmp_path):
    killed = host("first", pause=0.5)
    for _ in range(4):
        killed.stdout.readline()
    killed.kill()
    killed.wait()
    shutil.rmtree(tmp_path / "first")
    rebuilt, _ = finish(host("another"))
    assert rebuilt[0] == "building" and finish(host("second"))[0][0].split()[:2] == rebuilt[-1].split()[:2]


@pytest.mark.nightly
def test_processes_of_one_host_do_not_deadlock(host):
    waiting, building = host("both", builds=False), host("both")
    assert finish(building)[0][-1] == finish(waiting)[0][-1]


# ------------------------------------------------------------------ in this process


@pytest.fixture
def make(make_index, tmp_path):
    """An index that was copied from a store to another disk."""

    def run(name, url, **fields):
        (tmp_path / name).mkdir(exist_ok=True)
        return make_index(ROWS, directory=tmp_path / name, index_store=url, **fields)

    return run


@pytest.fixture
def memory():
    """A bucket that is lost with this process."""
    yield "memory://indices"
    if fsspec.filesystem("memory").exists("/indices"):
        fsspec.filesystem("memory").rm("/indices", recursive=True)


def stored(url):
    files = fsspec.filesystem("memory")
    return {path.rpartition("/")[2]: path for path in files.find("/indices")}


def test_an_index_goes_through_a_bucket_unchanged(make, memory, monkeypatch):
    first = make("first", memory)
    contents = json.loads(fsspec.filesystem("memory").cat_file(stored(memory)["contents.json"]))
    assert set(contents["files"]) == set(os.listdir(first.directory)) and contents["key"] == first.manifest["key"]
    monkeypatch.setattr("kto_jax.data.index.index.Builder", None)
    second = make("second", memory)
    assert second.manifest["content_sha256"] == first.manifest["content_sha256"]
    assert second.directory != first.directory and not list(second.directory.parent.glob("building-*"))


def test_an_existing_index_is_published_for_the_others(make, memory):
    make("first", "")
    assert not fsspec.filesystem("memory").exists("/indices")
    make("first", memory)
    assert "contents.json" in stored(memory)


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_copy_that_differs_from_the_published_index_is_refused_until_the_store_is_fixed(
    make, memory, tmp_path, damage
):
    make("first", memory)
    files = fsspec.filesystem("memory")
    path = next(path for name, path in stored(memory).items() if name.startswith("tokens-"))
    content = files.cat_file(path)
    if damage == "missing":
        files.rm_file(path)
    else:
        files.pipe_file(path, content[:-4] + (b"" if damage == "cut" else b"\1\0\0\0"))
    message = (
        "cannot be read: FileNotFoundError" if damage == "missing" else r"Delete memory://indices/\w{16}: the next"
    )
    with pytest.raises(ConfigError, match=message):
        make("second", memory)
    assert not list((tmp_path / "second" / "indices").iterdir())
    files.rm("/indices", recursive=True)
    assert make("second", memory).manifest["accepted"] == 24 and "contents.json" in stored(memory)


@pytest.mark.parametrize("text", ["{", "[]", "other key", "other version", "../escape"])
def test_contents_that_cannot_be_trusted_are_refused(make, memory, tmp_path, text):
    make("first", memory)
    files, path = fsspec.filesystem("memory"), stored(memory)["contents.json"]
    contents = json.loads(files.cat_file(path))
    if text == "other key":
        text = json.dumps(contents | {"key": "0" * 64})
    elif text == "other version":
        text = json.dumps(contents | {"format": 99})
    elif text == "../escape":
        text = json.dumps(contents | {"files": {text: next(iter(contents["files"].values()))}})
    files.pipe_file(path, text.encode())
    with pytest.raises(ConfigError, match=r"contents.json is broken, or of another version than 1"):
        make("second", memory)
    assert not list(tmp_path.rglob("escape"))


def test_waiting_ends_when_the_process_that_builds_is_gone(make, memory, monkeypatch, capsys):
    monkeypatch.setattr(store_module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(store_module, "_SIGN_SECONDS", 0.05)
    monkeypatch.setattr(store_module, "_PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(store_module, "_SAY_SECONDS", 0.3)
    key, store = "5" * 64, IndexStore(memory)
    with store.signs_of_building(key):
        thread = threading.Timer(1.2, store.publish, (key, Path(__file__).parent))
        thread.start()
        store.wait(key, lambda: False)  # three times its patience, because there are heartbeats
        thread.join()
    assert "still waiting for the index, " in capsys.readouterr().err
    assert not [name for name in stored(memory) if name == "building.json"]
    started = time.monotonic()
    with pytest.raises(TransientError, match=r"no sign of a process that builds the index, in memory://indices/6666"):
        store.wait("6" * 64, lambda: False)
    assert 0.4 < time.monotonic() - started < 5


def test_a_waiting_host_uses_an_index_that_another_process_brought_to_its_disk(memory, monkeypatch):
    monkeypatch.setattr(store_module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(store_module, "_PATIENCE_SECONDS", 1.0)
    calls = []
    IndexStore(memory).wait("7" * 64, lambda: len(calls) > 2 or calls.append(1))
    assert len(calls) == 3


def test_an_unusable_store_is_refused_before_anything_is_built(make, memory, monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError("your account may only read")

    monkeypatch.setattr("kto_jax.data.index.index.Builder", None)
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match=r"cannot be read: NotADirectoryError.*Check its name, the network and"):
        make("first", str(tmp_path / "a file"))
    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written to: PermissionError: your account may only read. It"):
        make("first", memory)


def test_a_store_of_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"index_store='carrier://pigeon' cannot be used: ValueError: Protocol not"):
        IndexStore("carrier://pigeon")


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/indices", "gcsfs"), ("s3://bucket/indices", "s3fs")])
def test_a_bucket_without_its_package_is_refused_with_the_package_to_install(url, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for protocol in list(imported):  # by an earlier test
        monkeypatch.delitem(imported, protocol)
    with pytest.raises(ConfigError, match=rf"needs the package {package}, .*pip install {package}\), or set a folder"):
        IndexStore(url)


def test_what_was_left_half_written_long_ago_is_removed(make, tmp_path):
    directory = make("first", "").directory
    folder = tmp_path / "store" / directory.name
    folder.mkdir(parents=True)
    for name in (".old.partial", ".new.partial"):
        (folder / name).touch()
    os.utime(folder / ".old.partial", (1, 1))
    make("first", str(tmp_path / "store"))
    assert sorted(path.name for path in folder.glob(".*.partial")) == [".new.partial"]


def test_without_a_store_every_host_builds(make_index, rows, tokenizer, tmp_path, monkeypatch):
    from kto_jax.config import DataConfig
    from kto_jax.data.index import builder
    from tests.data.conftest import InProcessWorkers

    monkeypatch.setattr(builder, "Workers", InProcessWorkers)
    data = DataConfig(train=str(rows), holdout=0.0)
    index = build_index(data, tokenizer, vocab_size=512, directory=tmp_path / "indices", builds=False)
    assert index.manifest["accepted"] == 24
