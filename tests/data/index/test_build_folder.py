"""Killed builds, and concurrent builds."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kto_jax.data.index import builder
from tests import ROOT

BUILD = """
import json, sys, time
from pathlib import Path
from kto_jax.config import DataConfig
from kto_jax.data.index import builder
from kto_jax.data.index.index import build_index
from kto_jax.data.tokens.tokenizer import TokenizerInfo

directory, info, pause = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
builder._CHUNK, builder._SAVE_SECONDS, write = 8, 0, builder.Builder._write

def slow_write(self, *chunk):
    write(self, *chunk)
    print("chunk", flush=True)
    time.sleep(pause)

builder.Builder._write = slow_write
tokenizer = TokenizerInfo(**info | {"directory": Path(info["directory"])})
sources = tuple(str(directory / name) for name in ("a.jsonl", "b.jsonl"))
data = DataConfig(train=sources, num_workers=1, holdout=0.25, max_rejected=0.5)
index = build_index(data, tokenizer, vocab_size=512, directory=directory / "indices")
print(index.manifest["content_sha256"])
"""


@pytest.fixture
def sources(tmp_path):
    """Two files of 40 and 21 rows, some of them rejected or left out."""
    for name, count in (("a", 40), ("b", 21)):
        rows = [
            {"prompt": f"Question {name}{i}?", "completion": f"Text {i}." * (i % 9 > 0), "label": i % 3 > 0}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def start(sources, tokenizer):
    """Starts a build in a separate process."""
    plain = dataclasses.replace(tokenizer, has_chat_template=False)
    info = json.dumps({**vars(plain), "directory": str(plain.directory), "rendering": None})
    started = []

    def run(pause=0.0):
        command = [sys.executable, "-c", BUILD, str(sources), info, str(pause)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def finish(process):
    """Chunks written, the content's digest, and what went to standard error."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.count("chunk"), out.split()[-1], err


def names(sources):
    return sorted(path.name for path in (sources / "indices").iterdir())


def build(make_index, sources, *, directory=None, **changes):
    files = [str(sources / "a.jsonl"), str(sources / "b.jsonl")]
    settings = {"train": tuple(files), "holdout": 0.25, "max_rejected": 0.5} | changes
    return make_index((), directory=directory or sources, **settings)


@pytest.mark.nightly
def test_of_two_processes_one_builds_and_both_have_the_same_index(start, sources):
    first, second = start(0.2), start(0.2)
    (chunks, digest, err), (other_chunks, other_digest, other_err) = finish(first), finish(second)
    assert digest == other_digest and sorted([chunks, other_chunks]) == [0, 8]
    assert (err + other_err).count("waiting for another run that builds the same index") == 1
    assert len(names(sources)) == 1 and not names(sources)[0].startswith("building")


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_build_is_resumed_and_leaves_no_process_and_no_folder(start, sources, tmp_path_factory):
    killed = start(0.1)
    for _ in range(6):  # into the second file
        assert killed.stdout.readline() == "chunk\n"
    workers = children(killed)
    killed.kill()
    killed.wait()
    assert workers and any(name.startswith("building-") for name in names(sources))
    chunks, digest, err = finish(start())
    assert 0 < chunks <= 4 and "resuming a build that was interrupted after" in err
    assert len(names(sources)) == 1 and not names(sources)[0].startswith("building")
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    for path in (sources / "indices").rglob("*"):
        path.unlink() if path.is_file() else None
    assert finish(start())[:2] == (8, digest)


class StoppedError(Exception):
    """Simulates a kill."""


@pytest.mark.parametrize("num_chunks", range(1, 9))
@pytest.mark.parametrize("torn", [False, True], ids=["saved", "torn"])
def test_wherever_a_build_is_interrupted_the_index_is_the_same(
    make_index, sources, tmp_path_factory, num_chunks, torn, monkeypatch
):
    whole = build(make_index, sources, directory=tmp_path_factory.mktemp("whole"))
    monkeypatch.setattr(builder, "_CHUNK", 8)
    monkeypatch.setattr(builder, "_SAVE_SECONDS", 0.0)
    write, written = builder.Builder._write, []

    def stop(self, *chunk):
        if len(written) == num_chunks - torn:
            if torn:  # the files hold more than progress.json says
                self._saved = time.monotonic() + 60
                write(self, *chunk)
            raise StoppedError
        write(self, *chunk)
        written.append(len(chunk[0]))

    with monkeypatch.context() as patch, contextlib.suppress(StoppedError):
        patch.setattr(builder.Builder, "_write", stop)
        build(make_index, sources)
    index = build(make_index, sources)
    assert index.manifest == whole.manifest | {"sources": index.manifest["sources"]} and index.manifest["rejected"] == 8
    assert [(s["rows"], s["rejected"]) for s in index.manifest["sources"]] == [(40, 5), (21, 3)]
    assert len(names(sources)) == 1


@pytest.mark.parametrize("damage", ["cut", "unreadable"])
def test_a_build_whose_progress_does_not_match_its_files_is_restarted(make_index, sources, monkeypatch, damage):
    digest = build(make_index, sources).manifest["content_sha256"]
    (final,) = (sources / "indices").iterdir()
    folder = final.with_name(f"building-{final.name}") / "index"
    final.rename(final.with_name("aside"))
    monkeypatch.setattr(builder.Builder, "finish", lambda *_: (_ for _ in ()).throw(StoppedError))
    with pytest.raises(StoppedError):
        build(make_index, sources)
    monkeypatch.undo()
    if damage == "cut":
        os.truncate(folder / "weights.raw", 4)
    else:
        (folder / "progress.json").write_text("{")
    assert build(make_index, sources).manifest["content_sha256"] == digest


def test_what_was_killed_long_ago_is_removed_but_not_what_is_held_or_new(make_index, sources):
    indices = sources / "indices"
    for name in ("old", "held", "new"):
        (indices / f"building-{name}" / "index").mkdir(parents=True)
        (indices / f"building-{name}" / "index" / "tokens.bin").write_bytes(b"1234")
        (indices / f"building-{name}" / "lock").touch()
    for path in indices.rglob("*"):
        if "new" not in str(path):
            os.utime(path, (1, 1))
    with (indices / "building-held" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(make_index, sources)
    assert [name for name in names(sources) if name.startswith("building-")] == ["building-held", "building-new"]


def test_a_file_system_without_locks_is_built_on_too_and_others_files_are_left_alone(
    make_index, sources, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    final = build(make_index, sources).directory
    shutil.rmtree(final)
    others = final.with_name(f"building-{final.name}") / "index" / "tokens.bin"
    others.parent.mkdir(parents=True)
    others.write_bytes(b"1234")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert build(make_index, sources).manifest["accepted"] == 53
    assert "cannot be locked" in capsys.readouterr().err
    assert others.read_bytes() == b"1234" and sorted(path.name for path in others.parents[1].iterdir()) == [
        "index",
        "lock",
    ]
