"""A machine to run the launch scripts on: real bash, real processes and real signals, and fakes of the clouds."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ["gke/jobset.sh", "gpu.sh", "local.sh", "slurm.sh", "tpu.sh"]
FAKES = ["docker", "gcloud", "kubectl", "sbatch", "scontrol", "squeue", "srun"]
SECRET = "hf_thisMustNeverBeSeen"
TPU = {
    "KTO_TPU_NAME": "mine",
    "KTO_TPU_ZONE": "us-west4-a",
    "KTO_TPU_TYPE": "v5litepod-16",
    "KTO_TPU_RUNTIME": "v2-alpha-tpuv5-lite",
    "KTO_TPU_SETUP": "touch mounted",
}
GKE = {
    "KTO_GKE_NAME": "mine",
    "KTO_GKE_IMAGE": "registry.example/kto_jax:tpu",
    "KTO_GKE_ACCELERATOR": "tpu-v5-lite-podslice",
    "KTO_GKE_TOPOLOGY": "4x4",
    "KTO_GKE_HOSTS": "4",
    "KTO_GKE_CHIPS": "4",
    "KTO_GKE_CLAIM": "runs",
}
# A complete, correct way to start each script.
COMPLETE = {
    "gke/jobset.sh": (GKE, ["run", "--", "python", "train"]),
    "gpu.sh": ({"KTO_IMAGE": "kto_jax:cuda"}, ["--", "python", "train"]),
    "local.sh": ({}, ["2", "--", "python", "train"]),
    "slurm.sh": ({}, ["--nodes=2", "--", "python", "train"]),
    "tpu.sh": (TPU, ["run", "--", "python", "train"]),
}


class Machine:
    """A machine with the fakes on its PATH, nothing of ours in its environment, and no pauses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "programs"
        programs.mkdir()
        for name in FAKES:
            program = programs / name
            program.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" -S -E "{ROOT}/tests/launch/fake_cloud.py" {name} "$@"\n'
            )
            program.chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE": str(folder),
            "KTO_PAUSE_SECONDS": "0",
            "KTO_POLL_SECONDS": "0",
            "KTO_GRACE_SECONDS": "1",
            "HF_TOKEN": SECRET,
        }

    def start(self, script: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", LAUNCH / script, *arguments],
            env=self.environment | settings,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **settings: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; no secret is in either, nor in any argument of a recorded call."""
        process = self.start(script, *arguments, **settings)
        out, err = process.communicate(timeout=60)
        assert SECRET not in out + err
        assert SECRET not in json.dumps([call["argv"] for call in self.calls()])
        return process.returncode, out, err

    def calls(self, name: str = "") -> list[dict]:
        record = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        return [call for call in calls if name in ("", call["name"])]

    def lines(self, name: str) -> list[str]:
        """What was written to a file of the machine, once there is something."""
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    def wait_for(self, name: str, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.lines(name)) < count:
            assert time.monotonic() < deadline, f"{name} has {self.lines(name)}"
            time.sleep(0.02)


def ends_with(*codes: int) -> list[str]:
    """A command that ends with these codes, one after the other, the last for ever."""
    text = (
        f"n=$(wc -l <ran 2>/dev/null || echo 0); echo run >>ran; codes=({' '.join(map(str, codes))}); "
        f"exit ${{codes[n < {len(codes)} ? n : {len(codes) - 1}]}}"
    )
    return ["bash", "-c", text]


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", f"import os, signal, sys, time\n{text}"]


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
