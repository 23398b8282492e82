"""Runs of the tiny model in processes of their own, on a disk or in a bucket, for benchmarks that injure them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fake_buckets import environment, serve_gcs
from tests.unsteady_proxy import UnsteadyProxy

ROOT = Path(__file__).parent.parent
STEPS_PER_EPOCH = 13
_SETTINGS = (
    "--config=configs/tiny.py",
    "--config.epochs=1000",
    "--config.optimizer.schedule=constant",
    "--config.evaluation.every=0",
    "--config.evaluation.max_examples=16",
)
_TIMED = ("seconds", "wait_seconds", "compile_seconds", "tokens_per_second", "mfu")


class TinyRun:
    """A run that is started, injured and started again; its processes have a HOME and a TMPDIR of their own.

    Args:
      folder: for all its files.
      num_steps: the run's length; may grow between two starts.
      every: steps between two checkpoints.

    Attributes:
      path: the run's folder, or that of the server's bucket.
      log: what its processes printed.
    """

    def __init__(self, folder: Path, num_steps: int, *, every: int = 5) -> None:
        self.num_steps, self._every = num_steps, every
        self.path, self.workdir = folder / "run", str(folder / "run")
        self._folders = {name: folder / name for name in ("HOME", "TMPDIR")}
        for path in self._folders.values():
            path.mkdir(parents=True, exist_ok=True)
        self._environment = os.environ | {
            "KTO_JAX_CACHE": str(folder.parent / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PLATFORMS": "cpu",
        }
        self._environment |= {name: str(path) for name, path in self._folders.items()}
        self.log = folder / "log"

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the run, or resumes it."""
        for left in self._folders["TMPDIR"].iterdir():  # by a process that was killed
            subprocess.run(["rm", "-rf", str(left)], check=True)
        command = [sys.executable, "-m", "kto_jax.train", *_SETTINGS, f"--workdir={self.workdir}"]
        command += [f"--config.max_steps={self.num_steps}", f"--config.checkpoint.every={self._every}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def finish(self) -> None:
        """Runs the rest.

        Raises:
          RuntimeError: the process fails; with the end of what it printed.
        """
        if code := self.start().wait():
            raise RuntimeError(f"exit code {code}: {self.tail()}")

    def tail(self) -> str:
        """The end of what the processes printed."""
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def copies(self) -> list[Path]:
        """The run's folder, and the working copies of a run in a bucket."""
        return [self.path, *self._folders["TMPDIR"].glob(f"kto_jax-*/{self.path.name}")]

    def num_rows(self) -> int:
        """Steps that were logged, also those that are not in the bucket yet."""
        logs = [copy / "metrics.jsonl" for copy in self.copies() if (copy / "metrics.jsonl").exists()]
        return max((log.read_bytes().count(b"\n") for log in logs), default=0)

    def wait_for_rows(self, number: int, process: subprocess.Popen[bytes]) -> bool:
        """Waits until this many steps are logged; False if the process ends before."""
        while process.poll() is None:
            with contextlib.suppress(OSError):  # The working copy may be removed meanwhile.
                if self.num_rows() >= number:
                    return True
            time.sleep(0.005)
        return False

    def wait_for_state(self, process: subprocess.Popen[bytes]) -> None:
        """Waits until the reference is being written, before the first step."""
        while process.poll() is None and not (self.path / "checkpoints/reference").exists():
            time.sleep(0.005)

    def steps(self) -> list[int]:
        """The checkpoints that were read back, oldest first."""
        found = (self.path / "checkpoints").glob("*/VERIFIED")
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())

    def figures(self) -> list[dict[str, Any]]:
        """The figures of every step, without those of the clock and of evaluation, which comes where a life ends."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: value for name, value in row.items() if name not in _TIMED and not name.startswith("eval_")}
            for row in rows
        ]

    def policy(self) -> bytes:
        """The result."""
        return (self.path / "policy/model.safetensors").read_bytes()

    def is_equal_to(self, other: TinyRun) -> bool:
        """Whether both have the same figures at all steps, and the same policy, to the bit."""
        return self.figures() == other.figures() and self.policy() == other.policy()


class BucketRun(TinyRun):
    """A run in a bucket of a server of its own, behind a proxy."""

    def __init__(self, folder: Path, num_steps: int, *, every: int = 5) -> None:
        super().__init__(folder, num_steps, every=every)
        self.proxy = UnsteadyProxy()
        self._server, self.proxy.upstream = serve_gcs(folder / "server", external_url=self.proxy.url)
        (folder / "server/bucket").mkdir()
        self.path, self.workdir = folder / "server/bucket/run", "gs://bucket/run"
        self._environment |= environment(self.proxy.url)

    def close(self) -> None:
        """Ends the server."""
        self.proxy.close()
        self._server.kill()
        self._server.wait()


@contextlib.contextmanager
def opened(kind: str, folder: Path, num_steps: int, *, every: int = 5) -> Iterator[TinyRun]:
    """A run on a "disk" or in a "bucket"."""
    if kind == "disk":
        yield TinyRun(folder, num_steps, every=every)
    else:
        with contextlib.closing(BucketRun(folder, num_steps, every=every)) as run:
            yield run
