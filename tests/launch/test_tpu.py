"""launch/tpu.sh, against a fake of gcloud."""

import json
import os
import re
import signal
import stat
import threading

import pytest

from tests import ROOT
from tests.launch.machine import SECRET, TPU, Machine, ends_with


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
    installed = (cloud.folder / "installed").read_text()
    assert f"jax[tpu]=={jax_version()}" in installed and re.search(r"gcsfs==\d+\.\d+\.\d+\b", installed)


def test_a_run_without_a_bucket_or_a_share_is_warned_of_lost_disks(machine):
    settings = {name: value for name, value in TPU.items() if name != "KTO_TPU_SETUP"}
    for workdir, expected in (("runs/mine", True), ("gs://bucket/mine", False)):
        code, _, err = machine.run("tpu.sh", "run", "--dry-run", "--", "train", f"--workdir={workdir}", **settings)
        assert code == 0 and ("the workers share no disk" in err) == expected


def jax_version() -> str:
    found = re.search(r"^jax==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_a_suspended_tpu_is_deleted_and_requested_again(cloud):
    states = [["CREATING", "ACTIVE", "SUSPENDED"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]
    code, verbs, err = tpu_run(cloud, states, ends_with(75, 0))
    assert code == 0, err
    assert verbs.count("create") == 2 and verbs.count("delete") == 1 and verbs.count("start") == 2
    assert len(cloud.lines("ran")) == 2 and "restart 1 of at most 20" in err


@pytest.mark.nightly
def test_a_tpu_with_preempted_nodes_is_deleted_even_while_active(cloud):
    (cloud.folder / "node_state").write_text("PREEMPTED")
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"], ["ACTIVE"]], ends_with(0), KTO_MAX_RESTARTS="1")
    assert code == 75 and verbs.count("create") == 2 and verbs.count("delete") == 2


def test_a_failed_tpu_request_is_deleted_and_repeated(cloud):
    code, verbs, _ = tpu_run(cloud, [["FAILED"], ["ACTIVE"]], ends_with(0))
    assert code == 0 and verbs.count("create") == 2 and verbs.count("delete") == 1 and verbs.count("start") == 1


def test_a_preempted_command_is_restarted_on_the_same_tpu(cloud):
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(75, 0))
    assert code == 0 and verbs.count("create") == 1 and verbs.count("start") == 2 and "delete" not in verbs


@pytest.mark.parametrize("code", [1, *(pytest.param(code, marks=pytest.mark.nightly) for code in (2, 130))])
def test_tpu_restarts_after_no_other_exit_code(cloud, code):
    found, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(code))
    assert found == code and verbs.count("start") == 1


@pytest.mark.nightly
def test_tpu_gives_up_after_the_maximum_number_of_restarts_in_a_row(cloud):
    code, verbs, _ = tpu_run(cloud, [["ACTIVE"]], ends_with(75), KTO_MAX_RESTARTS="1")
    assert code == 75 and verbs.count("start") == 2


def test_a_tpu_deleted_by_somebody_else_is_not_requested_again(cloud):
    code, verbs, err = tpu_run(cloud, [["ACTIVE", "DELETING"]], ends_with(0))
    assert code == 1 and verbs.count("create") == 1 and "deleted by somebody else" in err


def test_a_tpu_is_deleted_at_the_end_if_requested(cloud):
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


def test_tpu_secrets_are_copied_in_a_private_file_and_reach_the_command(cloud):
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


def test_tpu_run_again_follows_the_run_in_progress(cloud):
    (cloud.folder / "states.json").write_text('[["ACTIVE"]]')
    wait = ["bash", "-c", f"cd {cloud.folder}; echo ready >>ready; until [[ -e give_up ]]; do sleep 0.05; done"]
    first = cloud.start("tpu.sh", "run", "--", *wait, **TPU)
    cloud.wait_for("ready", 1)
    # The connection breaks, with everything on this side of it.
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=20)
    second = cloud.start("tpu.sh", "run", "--", *wait, **TPU)
    end = threading.Timer(30, (cloud.folder / "give_up").touch)  # If the second follows nothing, both still end.
    end.start()
    followed = any("already under way" in line for line in second.stderr)
    end.function()
    second.communicate(timeout=30)
    end.cancel()
    assert second.returncode == 0 and followed
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
