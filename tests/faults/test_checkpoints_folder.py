"""F8: the folder of a run's checkpoints is removed, replaced or made read-only while the run trains."""

import os
import subprocess
import sys

import pytest

from tests import COMPILER_FLAGS, ROOT
from tests.faults.test_full_disk import TINY

RUN = """
import ctypes, pathlib, runpy, shutil, sys
from kto_jax.training.logs import MetricsLog

folder, change, write = pathlib.Path(sys.argv.pop(1)), sys.argv.pop(1), MetricsLog.write

def obey_permissions():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, data) == 0
    data[0] &= ~2  # root may otherwise write to all folders
    assert libc.capset(header, data) == 0

def write_after_a_change(self, step, figures):
    write(self, step, figures)
    if step == 3:
        if change == "removed":
            shutil.rmtree(folder)
        elif change == "renamed":
            folder.rename(folder.with_name("elsewhere"))
        elif change == "a file":
            shutil.rmtree(folder)
            folder.write_text("")
        else:
            obey_permissions()
            folder.chmod(0o555)

MetricsLog.write = write_after_a_change
runpy.run_module("kto_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def run(tmp_path):
    def start(*program):
        """Runs or resumes the tiny model; returns exit code and messages."""
        command = [sys.executable, *program, *TINY, f"--workdir={tmp_path / 'run'}"]
        environment = os.environ | {"KTO_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": COMPILER_FLAGS}
        # Threads that wait for a failed save end after 300 s.
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "removed",
        pytest.param("renamed", marks=pytest.mark.exhaustive),
        pytest.param("a file", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_whose_checkpoints_are_gone_ends_with_one_line(change, run, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    code, said = run("-c", RUN, str(folder), change)
    assert code == 2, said
    errors = [line for line in said.splitlines() if "error" in line]
    assert len(errors) == 1 and f"{folder} was removed, renamed or replaced" in errors[0], said
    assert not (tmp_path / "run" / "policy").exists()
    if change == "renamed":
        folder.with_name("elsewhere").rename(folder)
        code, said = run("-m", "kto_jax.train")
        assert code == 0 and "continuing after step 2" in said, said


@pytest.mark.nightly
def test_a_run_whose_checkpoints_become_read_only_says_so_and_ends(run, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    code, said = run("-c", RUN, str(folder), "read-only")
    assert code in (1, 2), said
    assert "Permission denied" in said and str(folder) in said
    assert not (tmp_path / "run" / "policy").exists()
    folder.chmod(0o755)
    code, said = run("-m", "kto_jax.train")
    assert code == 0 and "continuing after step 2" in said, said
