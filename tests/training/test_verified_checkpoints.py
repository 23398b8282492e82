"""Checkpoints are read back, marked as verified, checked when they are restored, and set aside if they are damaged."""

import contextlib
import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from kto_jax.config import CheckpointConfig, ConfigError, MeshConfig
from kto_jax.devices.sharding import make_mesh
from kto_jax.training import checkpoints as module
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.leaf_digests import digest_leaves
from tests.training.test_checkpoints import advance, equal, make_abstract, make_state

MESH = MeshConfig(fsdp=4, data=2)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(module.console, "print", lambda text, **_: lines.append(text))
    return lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of three steps, and their states, by step."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, save_steps(folder)


@pytest.fixture
def states(saved, tmp_path):
    """The states of the checkpoints of three steps in tmp_path, by step."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return saved[1]


def save_steps(folder, count=3, **config):
    """Saves this many steps of a run; returns the states, by step."""
    state = make_state(make_mesh(MESH))
    states = {}
    with contextlib.closing(Checkpoints(folder, CheckpointConfig(**config))) as checkpoints:
        checkpoints.save_reference(state.reference)
        for step in range(1, count + 1):
            state = advance(state)
            states[step] = jax.device_get(state)
            checkpoints.save(step, state, None)
    return states


def reopen(folder, **config):
    with contextlib.closing(Checkpoints(folder, CheckpointConfig(**config))) as checkpoints:
        return checkpoints.restore_newest(make_abstract(make_mesh(MESH)))


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def data_files(folder):
    """The files that hold arrays and are read; Orbax leaves a second copy of each process's part."""
    return [path for path in (folder / "state" / "d").iterdir() if path.is_file()]


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


def mark_of(folder, step):
    return json.loads((folder / "checkpoints" / str(step) / "VERIFIED").read_text())


def test_a_checkpoint_is_marked_with_the_digests_of_the_saved_state(states, tmp_path):
    assert steps_in(tmp_path) == [2, 3]
    for step in (2, 3):
        mark = mark_of(tmp_path, step)
        assert mark["step"] == step and len(mark["reference"]) == 16
        assert (
            mark["digests"]["policy/embed/table"] == digest_leaves(jax.device_put(states[step].policy))["embed/table"]
        )
        assert mark["digests"]["step"] == f"{step:08x}"


def test_older_checkpoints_are_removed_only_after_the_new_one_was_read_back(tmp_path, monkeypatch):
    present = []
    read_back = Checkpoints._read_back
    monkeypatch.setattr(
        Checkpoints, "_read_back", lambda self, pending: (present.append(steps_in(tmp_path)), read_back(self, pending))
    )
    save_steps(tmp_path, count=3, keep=1)
    assert present == [[1], [1, 2], [2, 3]] and steps_in(tmp_path) == [3]


def test_a_checkpoint_that_differs_when_it_is_read_back_is_not_marked_and_older_ones_stay(tmp_path, said, monkeypatch):
    state = make_state(make_mesh(MESH))
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(keep=1))) as checkpoints:
        checkpoints.save(1, state, None)
        with monkeypatch.context() as broken:
            wrong = iter([dict.fromkeys(mark_of(tmp_path, 1)["digests"], "0" * 8)])
            broken.setattr(module, "digest_leaves", lambda tree: next(wrong, None) or digest_leaves(tree))
            checkpoints.save(2, state, None)
        assert "differ from what was saved" in checkpoints.failure and steps_in(tmp_path) == [1]
        assert "step 2 is not saved" in said[-1] and "policy/embed/table" in said[-1] and "\n" not in said[-1]
        checkpoints.save(3, state, None)
        assert not checkpoints.failure and steps_in(tmp_path) == [3]
    assert (tmp_path / "checkpoints" / "2.damaged").exists()


def test_arrays_are_read_back_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("kto_jax.training.checkpoint_reading.GROUP_BYTES", 4096)
    loaded = []
    load = module.StoredTree.load
    monkeypatch.setattr(module.StoredTree, "load", lambda self, wanted: loaded.append(wanted) or load(self, wanted))
    save_steps(tmp_path, count=1)
    assert len(loaded) > 3 and steps_in(tmp_path) == [1]


def test_a_save_in_the_background_is_verified_at_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(module.jax, "default_backend", lambda: "tpu")
    state = make_state(make_mesh(MESH))
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.save(1, state, None)
        assert not (tmp_path / "checkpoints" / "1" / "VERIFIED").exists()
        checkpoints._checkpointer.wait()
        checkpoints.poll()
        assert (tmp_path / "checkpoints" / "1" / "VERIFIED").exists()


@pytest.mark.parametrize("strict", [False, True])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_restored_unless_strict(states, strict, tmp_path, said):
    flip(largest_file(tmp_path / "checkpoints" / "3" / "state" / "d"), 8 * 700)
    if strict:
        with pytest.raises(ConfigError, match=r"3 is damaged: .*strict refuses to resume from an older one \(2\)"):
            reopen(tmp_path, strict=True)
        assert steps_in(tmp_path) == [2, 3] and said == []
        return
    restored = reopen(tmp_path)
    assert restored.step == 2 and equal(restored.policy, states[2].policy)
    assert steps_in(tmp_path) == [2] and (tmp_path / "checkpoints" / "3.damaged").is_dir()
    assert len(said) == 2 and "3 is damaged: " in said[0] and said[0].endswith("moved to 3.damaged")
    assert said[1] == "continuing from the checkpoint of step 2 instead"


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a data file is cut": lambda step: truncate(data_files(step)[0]),
    "a data file is deleted": lambda step: remove(data_files(step)[0]),
    "a data file is garbled": lambda step: data_files(step)[0].write_bytes(b"x" * 3000),
    "the state is deleted": lambda step: remove(step / "state"),
    "the database's manifest is deleted": lambda step: remove(step / "state" / "manifest.ocdbt"),
    "the database's manifest is garbled": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b"{}"),
    "the arrays' metadata is deleted": lambda step: remove(step / "state" / "_METADATA"),
    "the arrays' metadata is emptied": lambda step: (step / "state" / "_METADATA").write_bytes(b""),
    "the arrays' metadata is garbled": lambda step: (step / "state" / "_METADATA").write_bytes(b"\xff\xfe{"),
    "all metadata is deleted": lambda step: (remove(step / "_CHECKPOINT_METADATA"), remove(step / "VERIFIED")),
    "the folder is empty": lambda step: (remove(step), step.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_the_run_continues_from_the_checkpoint_before_with_one_line(
    states, damage, tmp_path, said, capfd
):
    DAMAGES[damage](tmp_path / "checkpoints" / "3")
    assert reopen(tmp_path).step == 2
    assert len(said) == 2 and "3 is damaged: " in said[0] and len(said[0]) < 600 and "\n" not in said[0]
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


HARMLESS = {
    "commit markers": lambda step: (remove(step / "commit_success.txt"), remove(step / "state" / "commit_success.txt")),
    "the record, which the mark repeats": lambda step: (step / "_CHECKPOINT_METADATA").write_bytes(b"xx{"),
    "the mark, which the record repeats": lambda step: (step / "VERIFIED").write_bytes(b"{"),
}


@pytest.mark.parametrize("damage", HARMLESS)
def test_a_checkpoint_whose_digests_agree_is_restored_without_(states, damage, tmp_path, said):
    HARMLESS[damage](tmp_path / "checkpoints" / "3")
    restored = reopen(tmp_path)
    assert restored.step == 3 and equal(restored.policy, states[3].policy) and said == []


@pytest.mark.parametrize("make, finding", [
    (lambda folder: (folder / "30").mkdir(), "30 is damaged: its _CHECKPOINT_METADATA is missing"),
    (lambda folder: shutil.copytree(folder / "3", folder / "30"), "30 is damaged: it is the checkpoint of step 3, ren"),
    (lambda folder: ((folder / "30").mkdir(), (folder / "30" / "notes").write_text("x")), "30 is damaged: its _CHECK"),
])  # fmt: skip
def test_a_foreign_folder_with_a_higher_number_is_set_aside(states, make, finding, tmp_path, said):
    make(tmp_path / "checkpoints")
    restored = reopen(tmp_path)
    assert restored.step == 3 and equal(restored.policy, states[3].policy)
    assert finding in said[0] and steps_in(tmp_path) == [2, 3]


def test_a_checkpoint_that_belongs_to_another_reference_is_set_aside(states, tmp_path, said):
    mesh = make_mesh(MESH)
    other = jax.tree.map(lambda leaf: leaf + 1, make_state(mesh))
    with contextlib.closing(Checkpoints(tmp_path / "other", CheckpointConfig())) as checkpoints:
        checkpoints.save_reference(other.reference)
        checkpoints.save(9, other, None)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9", tmp_path / "checkpoints" / "9")
    assert reopen(tmp_path).step == 3
    assert "belongs to reference" in said[0]


def test_if_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_moved(states, tmp_path, said):
    for step in (2, 3):
        truncate(data_files(tmp_path / "checkpoints" / str(step))[0])
    with pytest.raises(ConfigError, match=r"3 is damaged: .* 1 older ones are damaged too\. .* another --workdir"):
        reopen(tmp_path)
    assert steps_in(tmp_path) == [2, 3] and said == []


def test_a_damaged_reference_is_refused_by_the_name_of_its_array(states, tmp_path):
    folder = tmp_path / "checkpoints" / "reference"
    truncate(max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size))
    with pytest.raises(ConfigError, match=r"reference is damaged: .* The reference must not change"):
        reopen(tmp_path)


def test_a_run_of_a_version_without_digests_is_resumed_and_that_is_said(tmp_path, said, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_finish", lambda self: self._end_writing())
    with monkeypatch.context() as old:
        plain = module.ocp.training.Checkpointer.save_checkpointables_async
        old.setattr(
            module.ocp.training.Checkpointer, "save_checkpointables_async",
            lambda self, *given, custom_metadata, **options: plain(self, *given, **options),
        )  # fmt: skip
        save = module.ocp.save
        old.setattr(module.ocp, "save", lambda *given, custom_metadata, **options: save(*given, **options))
        states = save_steps(tmp_path, count=2)
    restored = reopen(tmp_path)
    assert restored.step == 2 and equal(restored.policy, states[2].policy)
    assert [("2 was" in line, "reference was" in line) for line in said] == [(True, False), (False, True)]


def test_a_lack_of_space_is_said_with_both_numbers_once_and_the_next_step_is_saved(tmp_path, said, monkeypatch):
    state = make_state(make_mesh(MESH))
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(keep=1))) as checkpoints:
        checkpoints.save(1, state, None)
        with monkeypatch.context() as full:
            full.setattr(module, "free_bytes", lambda folder: 1000)
            checkpoints.save(2, state, None)
            checkpoints.save(3, state, None)
        assert len(said) == 1 and "1,000 bytes free, and up to" in said[0] and "step 2 is not saved" in said[0]
        assert checkpoints.failure and steps_in(tmp_path) == [1]
        checkpoints.save_again(state)
        assert not checkpoints.failure and steps_in(tmp_path) == [3]
        assert said[1:] == ["the checkpoint of step 3 is saved; the one before had failed"]


def test_saves_leave_no_open_files_behind(tmp_path):
    """A writer of Orbax keeps three open, and a thread, until it is asked for its result."""
    state, held = make_state(make_mesh(MESH)), []
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state, None)
            checkpoints.wait()
            held.append(len(os.listdir("/dev/fd")))
    assert held[-1] <= held[1] + 3


@pytest.mark.parametrize("background", [False, True])
def test_an_error_of_the_writer_is_said_in_one_line_and_the_same_step_can_be_saved_again(
    background, tmp_path, said, monkeypatch
):
    if background:
        monkeypatch.setattr(module.jax, "default_backend", lambda: "tpu")
    state = make_state(make_mesh(MESH))
    end_writing = Checkpoints._end_writing

    def fail(self):
        end_writing(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.save(1, state, None)
        checkpoints.wait()
        with monkeypatch.context() as full:
            full.setattr(Checkpoints, "_end_writing", fail)
            checkpoints.save(2, state, None)
            checkpoints.wait()
        assert "No space left on device" in checkpoints.failure and "bytes are free in" in said[0]
        shutil.rmtree(tmp_path / "checkpoints" / "2")
        checkpoints._checkpointer.reload()
        checkpoints.save(2, state, None)
        checkpoints.wait()
        assert not checkpoints.failure and steps_in(tmp_path) == [1, 2]
    assert np.all([len(line.splitlines()) == 1 for line in said])


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def replace_by_empty_folder(folder):
    folder.rename(folder.with_name("moved"))
    folder.mkdir()


@pytest.mark.parametrize("change", [shutil.rmtree, replace_by_file, replace_by_empty_folder])
@pytest.mark.parametrize("call", ["poll", "save"])
def test_a_folder_of_checkpoints_that_is_gone_or_replaced_ends_the_run(tmp_path, change, call):
    state = make_state(make_mesh(MESH))
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.poll()
        checkpoints.save_reference(state.reference)
        checkpoints.poll()
        change(tmp_path / "checkpoints")
        with pytest.raises(ConfigError, match=r"checkpoints was removed, renamed or replaced .* it held reference\."):
            checkpoints.poll() if call == "poll" else checkpoints.save(1, state, None)


def test_of_what_a_folder_held_one_checkpoint_is_enough_to_go_on(tmp_path):
    state = advance(make_state(make_mesh(MESH)))
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.save(1, state, None)
        checkpoints.save(2, advance(state), None)
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        checkpoints.poll()
        for name in ("2", "reference"):
            shutil.rmtree(tmp_path / "checkpoints" / name)
        with pytest.raises(ConfigError, match="it held reference, 1, 2"):
            checkpoints.poll()
