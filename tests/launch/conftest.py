from pathlib import Path

import pytest

from tests.launch.machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


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
