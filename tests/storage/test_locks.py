"""Locks on files, and what happens where a file system has none."""

import errno
import fcntl
import os

import pytest

from kto_jax.config import Config
from kto_jax.data.tokens.tokenizer import TokenizerInfo
from kto_jax.storage.locks import lock_file
from kto_jax.storage.run_place import RunPlace
from kto_jax.training.run_folder import open_run
from tests.synthetic import make_index
from tests.training.test_inputs import ARCHITECTURE


def refuse(code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    return flock


def test_a_lock_that_another_holds_is_refused_at_once(tmp_path):
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        assert lock_file(first, wait=False, without="") is True
        with pytest.raises(BlockingIOError):
            lock_file(second, wait=False, without="")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks_is_reported_and_used_all_the_same(tmp_path, monkeypatch, capsys, code, wait):
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    with (tmp_path / "lock").open("a") as file:
        assert lock_file(file, wait=wait, without="Beware of twins.") is False
    said = capsys.readouterr().err
    assert str(tmp_path / "lock") in said and os.strerror(code) in said and "Beware of twins." in said


def test_a_run_on_a_file_system_without_locks_begins_with_a_warning(tmp_path, monkeypatch, capsys):
    index = make_index()
    index.manifest["content_sha256"] = "none"
    (tmp_path / "tokenizer").mkdir()
    tokenizer = TokenizerInfo(tmp_path / "tokenizer", 98, None, 2, (2,), "none", False)
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    open_run(RunPlace(tmp_path / "run"), Config(), index, tokenizer, ARCHITECTURE).lock.close()
    assert (tmp_path / "run" / "config.json").is_file()
    assert f"no other run writes to --workdir={tmp_path / 'run'}" in capsys.readouterr().err
