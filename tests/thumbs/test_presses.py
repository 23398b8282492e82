"""The file of presses: whole lines whatever happens, and nothing that was acknowledged is lost."""

import errno
import json
import multiprocessing
import os
import signal
import threading

import pytest

from kto_jax.thumbs.presses import Presses


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def press(number):
    return {"press": "up", "answer": f"a{number}", "prompt": "Q?", "completion": "é" * 50}


def test_a_press_gets_an_id_and_a_time_and_is_a_line_that_only_its_owner_reads(tmp_path):
    presses = Presses(tmp_path / "folder" / "presses.jsonl")
    assert presses.count() == {}
    rows = [presses.append(press(number)) for number in range(3)]
    assert rows_of(presses.path) == rows
    assert len({row["id"] for row in rows}) == 3 and all(row["time"].endswith("+00:00") for row in rows)
    assert presses.path.stat().st_mode & 0o777 == 0o600
    assert presses.count() == {"up": 3}


def test_text_that_is_no_unicode_does_not_break_the_line(tmp_path):
    presses = Presses(tmp_path / "presses.jsonl")
    presses.append({**press(0), "completion": "a\ud800b\nc\u2028"})
    assert rows_of(presses.path)[0]["completion"] == "a?b\nc\u2028"


@pytest.mark.parametrize("tail", [b'{"press": "up", "answ', b'{"press": "up", "completion": "\xc3', b"x" * 200_000])
def test_a_torn_line_is_moved_beside_and_counted(tmp_path, capsys, tail):
    presses = Presses(tmp_path / "presses.jsonl")
    presses.append(press(0))
    whole = presses.path.read_bytes()
    presses.path.write_bytes(whole + tail)
    presses.append(press(1))
    assert presses.path.read_bytes().startswith(whole)
    assert [row["answer"] for row in rows_of(presses.path)] == ["a0", "a1"]
    assert presses.num_torn == 1 and f"a line of {len(tail)} bytes" in capsys.readouterr().err
    assert (tmp_path / "presses.jsonl.torn").read_bytes() == tail + b"\n"


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    presses = Presses(tmp_path / "presses.jsonl")
    presses.path.write_text(json.dumps({"id": "by hand", **press(0)}))
    presses.append(press(1))
    assert [row["answer"] for row in rows_of(presses.path)] == ["a0", "a1"] and presses.num_torn == 0


def test_a_full_disk_is_reported_and_leaves_whole_lines(tmp_path, monkeypatch):
    presses = Presses(tmp_path / "presses.jsonl")
    presses.append(press(0))
    whole, write = presses.path.read_bytes(), os.write

    def full(descriptor, line):
        if len(line) < 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, line[:50])

    monkeypatch.setattr("kto_jax.thumbs.presses.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        presses.append(press(1))
    assert presses.path.read_bytes() == whole
    monkeypatch.setattr("kto_jax.thumbs.presses.os.write", write)
    presses.append(press(2))
    assert [row["answer"] for row in rows_of(presses.path)] == ["a0", "a2"]


def append_some(path, start):
    presses = Presses(path)
    threads = [
        threading.Thread(target=lambda first=first: [presses.append(press(first + i)) for i in range(25)])
        for first in (start, start + 25)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_and_processes_append_at_once(tmp_path):
    path = tmp_path / "presses.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_some, args=(path, 50 * number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = rows_of(path)
    assert sorted(row["answer"] for row in rows) == sorted(f"a{number}" for number in range(200))


def append_until_killed(path, pipe):
    presses = Presses(path)
    for number in range(100_000):
        pipe.send(presses.append(press(number))["id"])


def test_every_press_that_was_acknowledged_before_a_kill_is_in_the_file(tmp_path):
    path = tmp_path / "presses.jsonl"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=append_until_killed, args=(path, theirs))
    process.start()
    theirs.close()
    acknowledged = [ours.recv() for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        while ours.poll():
            acknowledged.append(ours.recv())
    except (EOFError, OSError):
        pass
    Presses(path).append(press(-1))
    written = [row["id"] for row in rows_of(path)]
    assert set(acknowledged) <= set(written) and len(written) - len(acknowledged) <= 2
