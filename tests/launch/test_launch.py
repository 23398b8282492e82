"""The launch scripts: real bash, real processes and real signals; only the clouds are fakes (fake_cloud.py)."""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

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


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


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


# ------------------------------------------------- all scripts


def test_the_scripts_are_clean_to_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install -r requirements-dev.txt"
    files = [*sorted(LAUNCH.rglob("*.sh")), ROOT / ".ci/run"]
    result = subprocess.run([program, "-x", *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_setting_and_calls_nothing(machine, script):
    code, out, err = machine.run(script, "--help")
    assert code == 0 and not err and not machine.calls()
    settings = set(re.findall(r"\bKTO_[A-Z_]+\b", (LAUNCH / script).read_text())) - {"KTO_LAUNCH"}
    assert settings <= set(re.findall(r"\bKTO_[A-Z_]+\b", out))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_and_calls_nothing(machine, script):
    settings, (*words, last) = COMPLETE[script]
    code, out, err = machine.run(script, "--dry-run", *words, last, **settings)
    assert code == 0, err
    assert "train" in out or "tpu_worker.sh" in out
    assert not machine.calls()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_command_is_an_error_in_three_parts(machine, script):
    settings, words = COMPLETE[script]
    code, _, err = machine.run(script, *words[: words.index("--")], **settings)
    assert code == 2 and not machine.calls()
    assert err.splitlines()[-1].startswith("error: No command was given. Allowed: ")
    assert "Add the training command after --" in err


@pytest.mark.parametrize(
    ("script", "name"),
    [("tpu.sh", name) for name in sorted(TPU) if name != "KTO_TPU_SETUP"]
    + [("gke/jobset.sh", name) for name in sorted(GKE)],
)
def test_a_missing_setting_is_an_error_in_three_parts(machine, script, name):
    settings, words = COMPLETE[script]
    code, _, err = machine.run(script, *words, **{key: value for key, value in settings.items() if key != name})
    assert code == 2 and not machine.calls()
    assert re.fullmatch(rf"error: {name} is not set\. Allowed: .+\. Set it: export {name}=.+\n", err)


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("gpu.sh", "KTO_MAX_RESTARTS", "many"),
        ("gpu.sh", "KTO_SECRETS", "HF_TOKEN=abc"),
        ("local.sh", "KTO_GRACE_SECONDS", "-1"),
        ("tpu.sh", "KTO_TPU_NAME", "No_Name"),
        ("tpu.sh", "KTO_TPU_SPOT", "yes"),
        ("tpu.sh", "KTO_TPU_SLICES", "0"),
        ("tpu.sh", "KTO_REVISION", "no-such-revision"),
        ("gke/jobset.sh", "KTO_GKE_HOSTS", "four"),
        ("gke/jobset.sh", "KTO_GKE_NAME", "two\nlines"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_in_three_parts(machine, script, name, value):
    settings, words = COMPLETE[script]
    code, _, err = machine.run(script, *words, **(settings | {name: value}))
    assert code == 2 and not machine.calls()
    assert re.search(r"^error: .+\. Allowed: .+\. .+\.$", err, re.MULTILINE | re.DOTALL)


# ------------------------------------------------- local.sh


def test_local_starts_every_rank_of_one_job(machine):
    show = 'names = ("COORDINATOR_ADDRESS", "COORDINATOR_BIND_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")\n'
    show += 'print(*(os.environ["JAX_" + name] for name in names), sys.argv[1])'
    code, out, _ = machine.run("local.sh", "3", "--", *python(show), "an argument")
    assert code == 0
    address = out.split()[0]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    assert sorted(out.splitlines()) == [f"{address} {address} 3 {rank} an argument" for rank in range(3)]


def test_local_ends_the_others_when_one_fails_and_returns_its_code(machine):
    text = """
rank = os.environ["JAX_PROCESS_ID"]
if rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), file=open("pids", "a"))
if rank == "2":
    while len(open("pids").readlines()) < 3:
        time.sleep(0.01)
    sys.exit(3)
time.sleep(600)
"""
    started = time.monotonic()
    code, _, err = machine.run("local.sh", "3", "--", *python(text))
    assert code == 3 and "process 2 ended with exit code 3" in err
    assert 1 <= time.monotonic() - started < 15
    assert len(machine.lines("pids")) == 3
    assert not any(alive(int(pid)) for pid in machine.lines("pids"))


def test_local_lets_the_others_save_when_one_was_preempted(machine):
    text = """
if os.environ["JAX_PROCESS_ID"] == "0":
    sys.exit(75)
time.sleep(0.5)
print("saved", file=open("saved", "a"))
sys.exit(75)
"""
    code, _, _ = machine.run("local.sh", "2", "--", *python(text), KTO_GRACE_SECONDS="20")
    assert code == 75 and machine.lines("saved") == ["saved"]


def test_local_waits_for_the_others_when_one_has_finished(machine):
    text = 'time.sleep(0.5 * int(os.environ["JAX_PROCESS_ID"]))\nprint("finished", file=open("finished", "a"))'
    code, _, _ = machine.run("local.sh", "2", "--", *python(text), KTO_GRACE_SECONDS="0")
    assert code == 0 and len(machine.lines("finished")) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_hands_signals_to_all(machine, number, code):
    text = f"""
def leave(number, frame):
    print(number, file=open("heard", "a"))
    sys.exit({code})
signal.signal({number:d}, leave)
print("ready", file=open("ready", "a"))
time.sleep(600)
"""
    process = machine.start("local.sh", "2", "--", *python(text))
    machine.wait_for("ready", 2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert machine.lines("heard") == [f"{number:d}"] * 2


def test_local_leaves_nothing_behind_when_interrupted_twice(machine):
    text = """
signal.signal(signal.SIGINT, lambda number, frame: print("heard", file=open("heard", "a")))
print(os.getpid(), file=open("pids", "a"))
while len(open("heard", "a+").readlines()) < 100:
    time.sleep(0.05)
    if os.path.exists("give_up"):
        sys.exit(9)
"""
    process = machine.start("local.sh", "2", "--", *python(text))
    machine.wait_for("pids", 2)
    process.send_signal(signal.SIGINT)
    machine.wait_for("heard", 2)
    process.send_signal(signal.SIGINT)
    machine.wait_for("heard", 4)
    (machine.folder / "give_up").touch()
    process.communicate(timeout=20)
    assert process.returncode == 9
    assert not any(alive(int(pid)) for pid in machine.lines("pids"))


# ------------------------------------------------- gpu.sh


def test_gpu_runs_a_preempted_command_again_until_it_finishes(machine):
    code, _, err = machine.run("gpu.sh", "--", *ends_with(75, 75, 0))
    assert code == 0 and len(machine.lines("ran")) == 3
    assert "restart 1 of at most 20" in err and "restart 2 of at most 20" in err


@pytest.mark.parametrize("code", [0, 1, 2, 127, 130, 137])
def test_gpu_restarts_at_no_other_code(machine, code):
    assert machine.run("gpu.sh", "--", *ends_with(code))[0] == code
    assert len(machine.lines("ran")) == 1


def test_gpu_gives_up_after_so_many_restarts_in_a_row(machine):
    code, _, err = machine.run("gpu.sh", "--", *ends_with(75), KTO_MAX_RESTARTS="2")
    assert code == 75 and len(machine.lines("ran")) == 3
    assert "after 2 restarts in a row" in err


def test_a_run_that_lasted_begins_a_new_row_of_restarts(machine):
    command = ["bash", "-c", f"sleep 1.1; {ends_with(75, 75, 0)[2]}"]
    assert machine.run("gpu.sh", "--", *command, KTO_MAX_RESTARTS="1", KTO_RESET_SECONDS="1")[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_gpu_hands_a_signal_on_and_does_not_restart_after_it(machine, number, code):
    text = f"""
def leave(number, frame):
    time.sleep(0.2)
    sys.exit({code})
signal.signal({number:d}, leave)
print("ready", file=open("ready", "a"))
time.sleep(600)
"""
    process = machine.start("gpu.sh", "--", *python(text))
    machine.wait_for("ready", 1)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code and len(machine.lines("ready")) == 1


def test_gpu_hands_secrets_to_docker_by_name(machine):
    (machine.folder / "docker.codes").write_text("75 0")
    code, _, _ = machine.run("gpu.sh", "--", "python", "train", KTO_IMAGE="kto_jax:cuda")
    first, second = machine.calls("docker")
    assert code == 0 and first == second
    assert first["argv"][-3:] == ["kto_jax:cuda", "python", "train"]
    assert "--env=HF_TOKEN" in first["argv"] and "--env=WANDB_API_KEY" not in first["argv"]
    assert f"--volume={machine.folder}/runs:/runs" in first["argv"]
    assert "HF_TOKEN" in first["environment"]


# ------------------------------------------------- slurm.sh


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


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_slurm_requeues_at_no_other_code(machine, code):
    assert slurm_job(machine, code) == (code, [SRUN])


def test_slurm_requeues_no_cancelled_job_and_only_so_often(machine):
    assert slurm_job(machine, 75, state="COMPLETING") == (75, [SRUN])
    assert slurm_job(machine, 75, SLURM_RESTART_COUNT="20") == (75, [SRUN, SRUN])


def test_slurm_refuses_what_would_give_a_task_the_wrong_gpu(machine):
    assert slurm_job(machine, 0, SLURM_GPUS_PER_TASK="1") == (2, [])


def test_slurm_script_given_to_sbatch_itself_says_so(machine):
    copy = shutil.copy(LAUNCH / "slurm.sh", machine.folder / "slurm_script")
    code, _, err = machine.run(str(copy), "--", "python", SLURM_JOB_ID="17")
    assert code == 2 and err.startswith("error: sbatch was called on this file. Allowed: ")


def test_slurm_asks_for_a_sigterm_ahead_of_time_and_for_requeues():
    options = re.findall(r"^#SBATCH (.+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(options)


# ------------------------------------------------- tpu.sh


@pytest.fixture
def cloud(machine: Machine) -> Machine:
    """A machine whose TPU workers have a python3 that installs nothing but makes the virtual environment."""
    program = machine.folder / "programs" / "python3"
    program.write_text(
        "#!/bin/sh\n"
        'echo "$@" >>"$FAKE/installed"\n'
        'case "$*" in "-m uv venv"*) mkdir -p venv/bin && touch venv/bin/python && chmod +x venv/bin/python ;; esac\n'
    )
    program.chmod(0o755)
    return machine


def tpu_run(cloud: Machine, states: list[list[str]], command: list[str], **settings: str) -> tuple[int, list[str], str]:
    """Exit code, the gcloud verbs in order (of ssh, what it ran), and stderr."""
    (cloud.folder / "states.json").write_text(json.dumps(states))
    # The worker forgets everything with its TPU; what must last is on a shared folder, here the machine's.
    code, _, err = cloud.run("tpu.sh", "run", "--", "env", f"--chdir={cloud.folder}", *command, **(TPU | settings))
    verbs = []
    for call in cloud.calls("gcloud"):
        ran = [word.split()[-1] for word in call["argv"] if word.startswith("--command=")]
        verbs += ran or [call["argv"][3]]
    return code, verbs, err


ATTEMPT = ["scp", "install", "start", "follow"]


def test_tpu_creates_waits_installs_runs_and_ends_with_the_code(cloud):
    code, verbs, err = tpu_run(cloud, [["CREATING", "ACTIVE"]], ends_with(0))
    assert code == 0, err
    assert verbs == ["describe", "create", "describe", "describe", "state", *ATTEMPT, "describe", "describe", "state"]
    create = next(call["argv"] for call in cloud.calls() if "create" in call["argv"])
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "mine"]
    assert set(create[5:]) == {
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=mine",
        "--spot",
        "--zone=us-west4-a",
        "--quiet",
    }
    for call in cloud.calls("gcloud"):
        # Everything that happens on workers happens on all, but the log is followed on one.
        if call["argv"][3] in ("scp", "ssh"):
            place = {"0"} if any(word.endswith(" follow") for word in call["argv"]) else {"all"}
            assert {word.split("=")[1] for word in call["argv"] if word.startswith(("--node=", "--worker="))} == place
    home = cloud.folder / "worker" / ".kto_jax"
    assert (home / "source" / "kto_jax" / "train.py").exists() and (home / "mounted").exists()
    assert f"jax[tpu]=={jax_version()}" in (cloud.folder / "installed").read_text()


def jax_version() -> str:
    found = re.search(r"^jax==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_tpu_that_is_taken_away_is_deleted_and_asked_for_again(cloud):
    states = [["CREATING", "ACTIVE", "SUSPENDED"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]
    code, verbs, err = tpu_run(cloud, states, ends_with(75, 0))
    assert code == 0, err
    assert verbs.count("create") == 2 and verbs.count("delete") == 1 and verbs.count("start") == 2
    assert len(cloud.lines("ran")) == 2 and "restart 1 of at most 20" in err


def test_tpu_whose_nodes_were_preempted_is_deleted_even_while_active(cloud):
    (cloud.folder / "node_state").write_text("PREEMPTED")
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"], ["ACTIVE"]], ends_with(0), KTO_MAX_RESTARTS="1")
    assert code == 75 and verbs.count("create") == 2 and verbs.count("delete") == 2


def test_tpu_request_that_failed_is_deleted_and_made_again(cloud):
    code, verbs, _ = tpu_run(cloud, [["FAILED"], ["ACTIVE"]], ends_with(0))
    assert code == 0 and verbs.count("create") == 2 and verbs.count("delete") == 1 and verbs.count("start") == 1


def test_tpu_runs_a_preempted_command_again_on_the_same_tpu(cloud):
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(75, 0))
    assert code == 0 and verbs.count("create") == 1 and verbs.count("start") == 2 and "delete" not in verbs


@pytest.mark.parametrize("code", [1, 2, 130])
def test_tpu_restarts_at_no_other_code(cloud, code):
    found, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(code))
    assert found == code and verbs.count("start") == 1


def test_tpu_gives_up_after_so_many_restarts_in_a_row(cloud):
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(75), KTO_MAX_RESTARTS="1")
    assert code == 75 and verbs.count("start") == 2


def test_tpu_that_somebody_else_deletes_is_not_asked_for_again(cloud):
    code, verbs, err = tpu_run(cloud, [["ACTIVE", "DELETING"]], ends_with(0))
    assert code == 1 and verbs.count("create") == 1 and "deleted by somebody else" in err


def test_tpu_is_deleted_at_the_end_when_asked(cloud):
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(1), KTO_TPU_DELETE="1")
    assert code == 1 and verbs[-1] == "delete"


def test_tpu_slices_are_nodes_of_one_request(cloud):
    settings = {"KTO_TPU_SLICES": "2", "KTO_TPU_SPOT": "0", "KTO_TPU_WAIT": "6h", "KTO_TPU_PROJECT": "ours"}
    assert tpu_run(cloud, [["ACTIVE"]], ends_with(0), **settings)[0] == 0
    create = next(call["argv"] for call in cloud.calls() if "create" in call["argv"])
    assert {"--node-count=2", "--node-prefix=mine", "--valid-until-duration=6h"} <= set(create)
    assert "--spot" not in create
    assert all("--project=ours" in call["argv"] for call in cloud.calls("gcloud"))
    looked_at = [call["argv"][4] for call in cloud.calls("gcloud") if call["argv"][2] == "tpu-vm"]
    assert looked_at == ["mine-0", "mine-1"]


def test_tpu_secrets_travel_in_a_private_file_and_reach_the_command(cloud):
    (cloud.folder / "expected").write_text(SECRET)
    show = [
        "bash",
        "-c",
        "[[ $HF_TOKEN == $(<expected) ]] && echo same >seen; [[ -v WANDB_API_KEY ]] || echo unset >>seen",
    ]
    code, _, err = tpu_run(cloud, [["ACTIVE"]], show)
    assert code == 0, err
    assert cloud.lines("seen") == ["same", "unset"]
    secrets = cloud.folder / "worker" / ".kto_jax" / "secrets.env"
    assert secrets.read_text() == f"HF_TOKEN={SECRET}\n"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600


@pytest.mark.parametrize("script", ["gpu.sh", "tpu.sh"])
def test_no_secret_is_shown_when_bash_traces_a_script(cloud, script):
    (cloud.folder / "states.json").write_text('[["ACTIVE"]]')
    settings, words = COMPLETE[script]
    result = subprocess.run(
        ["bash", "-x", LAUNCH / script, *words],
        env=cloud.environment | settings,
        cwd=cloud.folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "+ set -euo pipefail" in result.stderr and cloud.calls()
    assert SECRET not in result.stdout + result.stderr


def test_tpu_run_again_follows_the_run_that_is_under_way(cloud):
    (cloud.folder / "states.json").write_text('[["ACTIVE"]]')
    wait = ["bash", "-c", f"cd {cloud.folder}; echo ready >>ready; until [[ -e give_up ]]; do sleep 0.05; done"]
    first = cloud.start("tpu.sh", "run", "--", *wait, **TPU)
    cloud.wait_for("ready", 1)
    # The connection breaks, with everything on this side of it.
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=20)
    second = cloud.start("tpu.sh", "run", "--", *wait, **TPU)
    time.sleep(1)
    (cloud.folder / "give_up").touch()
    _, err = second.communicate(timeout=30)
    assert second.returncode == 0 and "already under way" in err
    assert cloud.lines("ready") == ["ready"]


def test_tpu_logs_and_delete_are_one_call_each(cloud):
    (cloud.folder / "states.json").write_text('[["ACTIVE"]]')
    assert tpu_run(cloud, [["ACTIVE"]], ["echo", "a line of the log"])[0] == 0
    (cloud.folder / "calls.jsonl").unlink()
    code, out, _ = cloud.run("tpu.sh", "logs", **TPU)
    assert code == 0 and "a line of the log" in out
    assert cloud.run("tpu.sh", "delete", **TPU)[0] == 0
    follow, delete = (call["argv"] for call in cloud.calls())
    assert {"--node=0", "--worker=0"} <= set(follow) and {"delete", "--force", "--quiet"} <= set(delete)


# ------------------------------------------------- gke/, sky.yaml, images


def jobset(machine: Machine, **settings: str) -> dict:
    command = ["python", "-m", "kto_jax.train", '--config.data.train=a "b" \\ ${HOME} # not a comment']
    assert machine.run("gke/jobset.sh", "run", "--", *command, **(GKE | settings))[0] == 0
    document = yaml.safe_load((machine.folder / "created.yaml").read_text())
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == command
    return document


def test_jobset_is_submitted_with_every_value_filled_in(machine):
    document = jobset(machine, KTO_GKE_SLICES="2", KTO_MAX_RESTARTS="7")
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and document["kind"] == "JobSet"
    assert document["metadata"]["name"] == "mine"
    (slices,) = document["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    assert slices["replicas"] == 2 and slices["template"]["spec"]["parallelism"] == 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert "${" not in json.dumps(document).replace("${HOME}", "")
    (call,) = machine.calls()
    assert call["argv"] == ["create", "--filename=-"]


def test_jobset_holds_a_job_that_kubernetes_would_take(machine):
    job = jobset(machine)["spec"]["replicatedJobs"][0]["template"]["spec"]
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": job}
    kubernetes_validate.validate(document, "1.37", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document | {"spec": job | {"backofLimit": 0}}, "1.37", strict=True)


def test_jobset_restarts_after_75_an_abort_or_a_lost_node_and_after_nothing_else(machine):
    spec = jobset(machine, KTO_MAX_RESTARTS="7")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    lost, failed = job["podFailurePolicy"]["rules"]
    # The rules are tried in order. Without retries of its own a job fails at the first pod that counts.
    assert lost == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"] == {"containerName": "train", "operator": "NotIn", "values": [75, 134]}
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["shareProcessNamespace"] is True  # else the abort of process 1 ends with 139
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert [(rule["action"], rule.get("onJobFailureReasons")) for rule in spec["failurePolicy"]["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"]),
        ("RestartJobSet", None),
    ]


def test_jobset_on_demand_asks_for_no_spot_nodes(machine):
    document = jobset(machine, KTO_GKE_SPOT="0")
    assert "gke-spot" not in json.dumps(document)


def test_jobset_secret_is_a_name_in_the_cluster(machine):
    document = jobset(machine, KTO_GKE_SECRET="ours")
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "ours", "optional": True}}]
    assert SECRET not in (machine.folder / "created.yaml").read_text()


def test_jobset_logs_and_delete_are_one_call_each(machine):
    assert machine.run("gke/jobset.sh", "logs", **GKE)[0] == 0
    assert machine.run("gke/jobset.sh", "delete", **GKE)[0] == 0
    logs, delete = (call["argv"] for call in machine.calls("kubectl"))
    assert logs[0] == "logs" and "jobset.sigs.k8s.io/jobset-name=mine" in logs[-1]
    assert delete == ["delete", "jobset", "mine"]


def test_sky_recovers_at_75_only_and_its_scripts_are_shell():
    document = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    resources = document["resources"]
    assert resources["use_spot"] and resources["job_recovery"] == {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [75],
    }
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=document[part], text=True, check=True)
    assert set(re.findall(r"\$\{?([A-Z]+)\b", document["run"])) <= {"SKYPILOT", "JAX", "HOME", *document["envs"]}


@pytest.mark.parametrize(("name", "extra"), [("Dockerfile.tpu", "tpu"), ("Dockerfile.cuda", "cuda13")])
def test_an_image_is_pinned_runs_as_no_root_and_takes_no_secret(name, extra):
    text = (LAUNCH / name).read_text()
    assert "\nFROM python:3.11-slim\n" in text and re.search(r"^USER 1000$", text, re.MULTILINE)
    assert f'"jax[{extra}]==$(sed -n' in text and "-r requirements.txt" in text
    assert not re.search(r"^ARG|TOKEN|KEY|PASSWORD", text, re.MULTILINE)
    copied = {words.split()[0] for words in re.findall(r"^COPY (.+)$", text, re.MULTILINE)}
    assert copied == {"requirements.txt", "kto_jax", "configs"}
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore == ["*", *(f"!{entry}" for entry in ["requirements.txt", "kto_jax", "configs"]), "**/__pycache__"]
