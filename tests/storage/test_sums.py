"""SHA256SUMS: what it holds, and what is found with it."""

import hashlib
import shutil
import subprocess

import pytest

from kto_jax.config import ConfigError
from kto_jax.storage import sums
from kto_jax.storage.sums import SUMS, check_export, damage_of, has_sums, write_sums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "README.md").write_text("# A model")
    write_sums(tmp_path)
    return tmp_path


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_the_file_is_that_of_sha256sum(folder):
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert (folder / SUMS).read_text() == "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    assert has_sums(folder) and damage_of(folder) == ""
    (folder / "README.md").write_text("# Another")
    assert damage_of(folder) == ""


@pytest.mark.parametrize("bit", [0, 777, 256 * 8 * 8 - 1])
def test_a_flipped_bit_is_found(folder, bit):
    flip(folder / "model.safetensors", bit)
    assert damage_of(folder) == "model.safetensors differs from SHA256SUMS"
    assert damage_of(folder, lambda name: name == "config.json") == ""
    flip(folder / "config.json", 3)
    assert damage_of(folder) == "config.json, model.safetensors differ from SHA256SUMS"


@pytest.mark.parametrize("damage, found", [
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors differs from SHA256SUMS"),
    (lambda folder: (folder / SUMS).write_bytes(b""), "SHA256SUMS is damaged in line 1"),
    (lambda folder: (folder / SUMS).write_bytes(b"\xff\xfe"), "SHA256SUMS cannot be read ('utf-8'"),
    (lambda folder: flip(folder / SUMS, 65 * 8), "SHA256SUMS is damaged in line 1"),
    (lambda folder: (folder / SUMS).write_text(f"{'0' * 64}  ../x\n"), "SHA256SUMS names '../x', which is no file"),
])  # fmt: skip
def test_whatever_is_damaged_is_named(folder, damage, found):
    damage(folder)
    assert damage_of(folder).startswith(found)


def test_files_in_folders_below_are_compared_if_they_are_named(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    write_sums(tmp_path, ["below/a"])
    (tmp_path / "b").write_text("c")
    assert damage_of(tmp_path) == ""
    (tmp_path / "below" / "a").write_text("c")
    assert damage_of(tmp_path) == "below/a differs from SHA256SUMS"


def test_a_damaged_export_is_refused_by_the_part_that_is_read_and_an_unchanged_one_is_read_once(folder, monkeypatch):
    reads, sha256 = [], sums.sha256
    monkeypatch.setattr(sums, "sha256", lambda path: reads.append(path.name) or sha256(path))
    for _ in range(2):
        check_export(folder, weights=False)
        check_export(folder, weights=True)
    assert reads == ["config.json", "model.safetensors"]
    flip(folder / "model.safetensors", 9)
    check_export(folder, weights=False)
    with pytest.raises(ConfigError, match=r"is damaged: model.safetensors differs from .* export it again; if you"):
        check_export(folder, weights=True)
    (folder / SUMS).unlink()
    check_export(folder, weights=True)
