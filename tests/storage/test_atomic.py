import errno
import os

import pytest

from kto_jax.storage import atomic
from kto_jax.storage.atomic import new_file, new_folder, write_json, write_text


@pytest.fixture
def calls(monkeypatch):
    """The order of what makes a file durable: which paths were flushed, and what was renamed where."""
    seen, paths = [], {}
    opened, replace, rename = os.open, os.replace, os.rename

    def open_(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        paths[descriptor] = os.fspath(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(("flush", os.path.basename(paths[descriptor]))))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("rename", os.path.basename(b))), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(("rename", os.path.basename(b))), rename(a, b)))
    return seen


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, calls):
    write_text(tmp_path / "rows", "new")
    assert calls == [("flush", ".rows.partial"), ("rename", "rows"), ("flush", tmp_path.name)]
    assert (tmp_path / "rows").read_text() == "new"


def test_a_folder_is_flushed_with_all_its_files_before_it_is_renamed(tmp_path, calls):
    with new_folder(tmp_path / "policy") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "weights").write_text("w")
    assert calls[-2:] == [("rename", "policy"), ("flush", tmp_path.name)]
    assert {name for kind, name in calls[:-2]} == {"weights", "inner", ".policy.partial"}


@pytest.mark.parametrize("before", ["old", None])
def test_a_body_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, before):
    path = tmp_path / "rows"
    if before:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), new_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == (["rows"] if before else [])
    assert not before or path.read_text() == before


def test_a_body_that_fails_leaves_the_old_folder_and_nothing_beside_it(tmp_path):
    path = tmp_path / "policy"
    with new_folder(path) as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(RuntimeError), new_folder(path) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["policy"] and (path / "weights").read_text() == "old"


def test_a_new_folder_replaces_an_old_one_and_what_a_killed_writer_left(tmp_path):
    path = tmp_path / "below" / "policy"
    for folder in (path, path.with_name(".policy.partial"), path.with_name(".policy.old")):
        folder.mkdir(parents=True)
        (folder / "stale").write_text("")
    with new_folder(path) as partial:
        (partial / "weights").write_text("new")
    assert os.listdir(path.parent) == ["policy"] and os.listdir(path) == ["weights"]


def test_a_killed_writer_s_file_is_replaced_by_the_next_writer(tmp_path):
    (tmp_path / ".rows.partial").write_text("half")
    write_text(tmp_path / "rows", "whole")
    assert os.listdir(tmp_path) == ["rows"]


def test_two_that_write_a_shared_file_at_once_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "rows"
    with new_file(path, shared=True) as first, new_file(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["rows"]  # The last one to finish.


@pytest.mark.parametrize("has_links", [True, False])
def test_without_replace_the_first_file_stays(tmp_path, monkeypatch, has_links):
    if not has_links:

        def refuse(*args):
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "rows"
    for text in ("first", "second"):
        with new_file(path, shared=True, replace=False) as partial:
            partial.write_text(text)
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["rows"]


def test_a_file_system_that_cannot_flush_folders_is_written_to(tmp_path, monkeypatch):
    flush = atomic._flush

    def without_folders(path):
        if path.is_dir():
            raise OSError(errno.EINVAL, "not here")
        flush(path)

    monkeypatch.setattr(atomic, "_flush", without_folders)
    write_json(tmp_path / "values.json", {"π": 1})
    assert (tmp_path / "values.json").read_text() == '{\n  "\\u03c0": 1\n}\n'


def test_a_disk_that_fails_to_flush_is_reported_and_the_old_file_stays(tmp_path, monkeypatch):
    (tmp_path / "rows").write_text("old")

    def fail(descriptor):
        raise OSError(errno.EIO, "the disk failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk failed"):
        write_text(tmp_path / "rows", "new")
    assert (tmp_path / "rows").read_text() == "old" and os.listdir(tmp_path) == ["rows"]
