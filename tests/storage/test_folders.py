import errno
import tempfile

import pytest

from kto_jax.config import ConfigError
from kto_jax.storage.folders import cache_folder, reporting_write_errors, scratch_folder


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "a file"))
    with pytest.raises(ConfigError, match=r"cannot be written: .* set KTO_JAX_CACHE to another folder") as refusal:
        cache_folder("wheels")
    assert "\n" not in str(refusal.value)


def test_a_full_disk_under_the_cache_is_refused_in_one_line(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"No space left on device.*Free some space"),
        reporting_write_errors(tmp_path / "rows"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_no_place_for_temporary_files_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with (
        pytest.raises(ConfigError, match=r"no temporary folder can be created: .* set TMPDIR") as refusal,
        scratch_folder(),
    ):
        pass
    assert "\n" not in str(refusal.value)


def test_an_error_in_a_temporary_folder_is_not_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="mine"), scratch_folder() as scratch:
        assert scratch.is_dir()
        raise OSError("mine")
    assert not list(tmp_path.iterdir())
