"""launch/gke/jobset.sh against a fake of kubectl; launch/sky.yaml and the Dockerfiles as text."""

import json
import re
import subprocess

import kubernetes_validate
import pytest
import yaml

from tests import ROOT
from tests.launch.machine import GKE, LAUNCH, SECRET, Machine


def jobset(machine: Machine, **settings: str) -> dict:
    command = ["python", "-m", "kto_jax.train", '--config.data.train=a "b" \\ ${HOME} # not a comment']
    assert machine.run("gke/jobset.sh", "run", "--", *command, **(GKE | settings))[0] == 0
    document = yaml.safe_load((machine.folder / "created.yaml").read_text())
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == command
    return document


def test_a_submitted_jobset_has_every_value_filled_in(machine):
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


def test_jobset_of_a_run_in_a_bucket_needs_no_volume(machine):
    settings = {name: value for name, value in GKE.items() if name != "KTO_GKE_CLAIM"}
    code, _, err = machine.run("gke/jobset.sh", "run", "--", "train", "--workdir=/runs/mine", **settings)
    assert code == 2 and "Neither KTO_GKE_CLAIM nor a --workdir in a bucket is set." in err
    code, _, err = machine.run("gke/jobset.sh", "run", "--", "train", "--workdir=gs://bucket/mine", **settings)
    assert code == 0, err
    document = yaml.safe_load((machine.folder / "created.yaml").read_text())
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "volumes" not in pod and "volumeMounts" not in pod["containers"][0]


def test_jobset_contains_a_valid_kubernetes_job(machine):
    job = jobset(machine)["spec"]["replicatedJobs"][0]["template"]["spec"]
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": job}
    kubernetes_validate.validate(document, "1.37", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document | {"spec": job | {"backofLimit": 0}}, "1.37", strict=True)


def test_jobset_restarts_only_after_75_an_abort_or_a_lost_node(machine):
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


def test_jobset_on_demand_requests_no_spot_nodes(machine):
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


def test_sky_recovers_only_after_75_or_an_abort_and_its_scripts_are_valid_bash():
    document = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    resources = document["resources"]
    assert resources["use_spot"] and resources["job_recovery"] == {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [75, 134],
    }
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=document[part], text=True, check=True)
    assert set(re.findall(r"\$\{?([A-Z]+)\b", document["run"])) <= {"SKYPILOT", "JAX", "HOME", *document["envs"]}


@pytest.mark.parametrize(("name", "extra"), [("Dockerfile.tpu", "tpu"), ("Dockerfile.cuda", "cuda13")])
def test_an_image_is_pinned_does_not_run_as_root_and_takes_no_secret(name, extra):
    text = (LAUNCH / name).read_text()
    assert "\nFROM python:3.11-slim\n" in text and re.search(r"^USER 1000$", text, re.MULTILINE)
    assert f'"jax[{extra}]==$(sed -n' in text and "-r requirements.txt" in text
    assert "grep -o 'gcsfs==" in text and ("tokamax==" in text) == (extra == "cuda13")
    assert not re.search(r"^ARG|TOKEN|KEY|PASSWORD", text, re.MULTILINE)
    copied = {words.split()[0] for words in re.findall(r"^COPY (.+)$", text, re.MULTILINE)}
    assert copied == {"requirements.txt", "kto_jax", "configs"}
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore == ["*", *(f"!{entry}" for entry in ["requirements.txt", "kto_jax", "configs"]), "**/__pycache__"]
