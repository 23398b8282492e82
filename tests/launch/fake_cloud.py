"""Stands in for gcloud, kubectl, docker and Slurm's commands in tests/launch/machine.py, which puts it on the PATH.

Every call is recorded in $FAKE/calls.jsonl: its argv and the names of its variables. A call whose name has a file
$FAKE/NAME.codes ends with the next code of that file. gcloud plays a queued resource: $FAKE/states.json holds, for each
creation, the states that one look after the other shows, the last for ever; ssh runs its command on a worker whose
home is $FAKE/worker, and scp copies there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

FAKE = Path(os.environ["FAKE"])


def main() -> int:
    name, argv = sys.argv[1], sys.argv[2:]
    with (FAKE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"name": name, "argv": argv, "environment": sorted(os.environ)}) + "\n")
    if name == "kubectl" and argv[0] == "create":
        (FAKE / "created.yaml").write_text(sys.stdin.read())
    if name == "squeue":
        print((FAKE / "squeue").read_text())
    if name == "gcloud":
        return gcloud(argv)
    codes = FAKE / f"{name}.codes"
    if not codes.exists():
        return 0
    first, *rest = codes.read_text().split()
    codes.write_text(" ".join(rest or [first]))
    return int(first)


def gcloud(argv: list[str]) -> int:
    noun, verb, rest = argv[2], argv[3], argv[4:]
    worker, creation = FAKE / "worker", FAKE / "creation.json"
    if noun == "tpu-vm":
        print((FAKE / "node_state").read_text() if (FAKE / "node_state").exists() else "READY")
    elif verb == "create":
        states = json.loads((FAKE / "states.json").read_text())
        creation.write_text(json.dumps(states[0]))
        (FAKE / "states.json").write_text(json.dumps(states[1:]))
        worker.mkdir()
    elif verb == "delete":
        creation.unlink()
        shutil.rmtree(worker)
    elif not creation.exists():
        print("ERROR: (gcloud.compute.tpus.queued-resources) NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    elif verb == "describe":
        state, *later = json.loads(creation.read_text())
        creation.write_text(json.dumps(later or [state]))
        print(state)
    elif verb == "scp":
        shutil.copytree(rest[1], worker / Path(rest[1]).name, dirs_exist_ok=True)
    elif verb == "ssh":
        command = next(word.removeprefix("--command=") for word in rest if word.startswith("--command="))
        return subprocess.run(["bash", "-c", command], cwd=worker).returncode
    return 0


sys.exit(main())
