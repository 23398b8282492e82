"""A save that fails in the middle: the run says so and goes on, ends without waiting for Orbax, and is resumed."""

import os
import re
import subprocess
import sys

import pytest

from tests import COMPILER_FLAGS, ROOT

RUN = """
import contextlib, resource, runpy, sys
from kto_jax.training import loop
from kto_jax.training.checkpoints import Checkpoints

save, steps = Checkpoints.save, [int(step) for step in sys.argv.pop(1).split(",")]

@contextlib.contextmanager
def full():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def save_with_a_fault(self, step, *given):
    with full() if step in steps else contextlib.nullcontext():
        save(self, step, *given)

Checkpoints.save, loop._RETRY_SECONDS = save_with_a_fault, 0.1
runpy.run_module("kto_jax.train", run_name="__main__", alter_sys=True)
"""
# Orbax and TensorStore write at once; the error is that of the first to fail.
NOT_SAVED = (
    r"the checkpoint of step {step} is not saved: (OSError: \[Errno 27\]|ValueError: OUT_OF_RANGE: Failed writing)"
)
TINY = [
    "--config=configs/tiny.py",
    "--config.max_steps=5",
    "--config.checkpoint.every=2",
    "--config.samples.num_prompts=0",
]


@pytest.fixture
def run(tmp_path):
    def start(steps, name="run"):
        """Runs or resumes the tiny model with a fault at the saves of some steps; returns exit code and messages."""
        command = [sys.executable, "-c", RUN, steps, *TINY, f"--workdir={tmp_path / name}"]
        environment = os.environ | {"KTO_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": COMPILER_FLAGS}
        # Threads that wait for a failed save end after 300 s.
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    return start


@pytest.mark.nightly
def test_a_run_whose_last_save_failed_ends_soon_with_1_and_is_resumed(run, tmp_path):
    code, said = run("5")
    assert code == 1 and re.search(NOT_SAVED.format(step=5), said), said
    assert "error: the last checkpoint is not saved" in said and not (tmp_path / "run" / "policy").exists()
    code, said = run("0")
    assert code == 0 and "continuing after step 4" in said
    assert run("0", "unbroken")[0] == 0
    one, other = (tmp_path / name / "policy" / "model.safetensors" for name in ("run", "unbroken"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_save_that_failed_is_followed_by_one_after_the_next_step(run):
    code, said = run("2")
    assert code == 0 and len(re.findall(NOT_SAVED.format(step=2), said)) == 1, said
    assert "the checkpoint of step 3 is saved; the one before had failed" in said
