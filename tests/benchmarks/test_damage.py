"""The count of flipped bits that are found."""

import random

import pytest

from benchmarks.damage import Kept, count_found, flipped
from kto_jax.config import ConfigError
from kto_jax.storage.sums import damage_of, write_sums


def test_a_flip_changes_one_bit_and_is_undone(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x00\x0f")
    with flipped(path, 11):
        assert path.read_bytes() == b"\x00\x07"
    assert path.read_bytes() == b"\x00\x0f"


@pytest.mark.parametrize("raises", [False, True])
def test_flips_are_counted_that_a_reader_reports_or_refuses(tmp_path, raises):
    read, unread = tmp_path / "read", tmp_path / "unread"
    for path in (read, unread):
        path.write_bytes(bytes(500))
    write_sums(tmp_path, ["read"])

    def find():
        found = damage_of(tmp_path)
        if found and raises:
            raise ConfigError(found)
        return found

    assert count_found(Kept("files", [read], find), 8, random.Random(0)) == 8
    assert count_found(Kept("files", [unread], find), 8, random.Random(0)) == 0
    assert 0 < count_found(Kept("files", [read, unread], find), 12, random.Random(0)) < 12


@pytest.mark.exhaustive
def test_every_flip_in_what_a_run_keeps_is_found(capsys, monkeypatch):
    from benchmarks import damage

    monkeypatch.setattr("sys.argv", ["damage", "--flips=3"])
    assert damage.main() == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 10 and all(int(row[3]) + int(row[4]) == 3 for row in rows)
