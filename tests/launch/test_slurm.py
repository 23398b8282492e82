"""launch/slurm.sh, against fakes of Slurm's commands."""

import re
import shutil

import pytest

from tests.launch.machine import LAUNCH, Machine


def test_slurm_submits_itself_with_the_options_and_the_command(machine):
    assert machine.run("slurm.sh", "--nodes=2", "--time=1:00:00", "--", "python", "train", "--x=a b")[0] == 0
    (call,) = machine.calls()
    script = str(LAUNCH / "slurm.sh")
    assert call["name"] == "sbatch"
    assert call["argv"] == ["--nodes=2", "--time=1:00:00", "--export=ALL", script, "--", "python", "train", "--x=a b"]
    assert {"HF_TOKEN", "KTO_LAUNCH"} <= set(call["environment"])


def slurm_job(machine: Machine, code: int, state: str = "RUNNING", **settings: str) -> tuple[int, list[str]]:
    """What the batch script ends with and calls when the tasks end with a code; it runs from a copy, as under Slurm."""
    (machine.folder / "srun.codes").write_text(str(code))
    (machine.folder / "squeue").write_text(state)
    copy = shutil.copy(LAUNCH / "slurm.sh", machine.folder / "slurm_script")
    settings = {"SLURM_JOB_ID": "17", "KTO_LAUNCH": str(LAUNCH)} | settings
    result = machine.run(str(copy), "--", "python", "train", **settings)
    return result[0], [" ".join([call["name"], *call["argv"]]) for call in machine.calls() if call["name"] != "squeue"]


SRUN = "srun --kill-on-bad-exit=0 --wait=600 python train"


def test_slurm_requeues_a_preempted_job(machine):
    assert slurm_job(machine, 75, SLURM_RESTART_COUNT="19") == (0, [SRUN, "scontrol requeue 17"])
    assert slurm_job(machine, 134) == (0, [SRUN, "scontrol requeue 17", SRUN, "scontrol requeue 17"])


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_slurm_requeues_after_no_other_exit_code(machine, code):
    assert slurm_job(machine, code) == (code, [SRUN])


def test_slurm_requeues_no_cancelled_job_and_no_job_beyond_the_maximum(machine):
    assert slurm_job(machine, 75, state="COMPLETING") == (75, [SRUN])
    assert slurm_job(machine, 75, SLURM_RESTART_COUNT="20") == (75, [SRUN, SRUN])


def test_slurm_refuses_gpus_per_task(machine):
    assert slurm_job(machine, 0, SLURM_GPUS_PER_TASK="1") == (2, [])


def test_a_slurm_script_given_to_sbatch_directly_is_refused(machine):
    copy = shutil.copy(LAUNCH / "slurm.sh", machine.folder / "slurm_script")
    code, _, err = machine.run(str(copy), "--", "python", SLURM_JOB_ID="17")
    assert code == 2 and err.startswith("error: sbatch was called on this file. Allowed: ")


def test_slurm_requests_an_early_sigterm_and_requeues():
    options = re.findall(r"^#SBATCH (.+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(options)
