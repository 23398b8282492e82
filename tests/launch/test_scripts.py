"""What all launch scripts share: help, dry runs, errors and secrets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.launch.machine import COMPLETE, GKE, LAUNCH, SCRIPTS, SECRET, TPU


def test_shellcheck_finds_nothing_in_the_scripts():
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
    + [("gke/jobset.sh", name) for name in sorted(GKE) if name != "KTO_GKE_CLAIM"],
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
def test_an_invalid_setting_is_an_error_in_three_parts(machine, script, name, value):
    settings, words = COMPLETE[script]
    code, _, err = machine.run(script, *words, **(settings | {name: value}))
    assert code == 2 and not machine.calls()
    assert re.search(r"^error: .+\. Allowed: .+\. .+\.$", err, re.MULTILINE | re.DOTALL)


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
