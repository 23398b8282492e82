"""Training on what was pressed so far: a run of `kto_jax.train` in a process of its own, one at a time.

Every run starts from the model that the page was opened with and takes all presses that count, so none is trained on
twice as often as another:

    FOLDER/trained_001.jsonl        the presses that it reads, as they were when it began
    FOLDER/trained_001.log          what it prints
    FOLDER/trained_001/             the run
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from kto_jax.config import ConfigError
from kto_jax.thumbs.presses import Presses

_LOOK_SECONDS = 0.5
_STEP = re.compile(r"step (\d+)/(\d+)")
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\S+ ")
_NUM_LINES = 3


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      text: the last thing that it printed.
      step: steps taken.
      num_steps: of the whole run; 0 if that is not known yet.
      policy: the model that it made, once it has ended well.
    """

    text: str
    step: int = 0
    num_steps: int = 0
    policy: Path | None = None


class Training:
    """The train button.

    Args:
      presses: what is trained on.
      start: the model that runs start from, as `config.model.path` takes it.
      why_not: why nothing can be trained; "" if it can.
      recipe: the config file.
      settings: fields of the configuration, by their dotted names.
    """

    def __init__(self, presses: Presses, start: str, why_not: str, recipe: str, settings: Mapping[str, str]) -> None:
        self._presses, self._start, self._why_not, self._recipe, self._settings = (
            presses,
            start,
            why_not,
            recipe,
            dict(settings),
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        """Whether a run has not ended."""
        return self._process is not None and self._process.poll() is None

    def command(self, folder: Path, presses: Path) -> list[str]:
        """The command of a run."""
        settings = {"data.train": str(presses), "model.path": self._start, **self._settings}
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        return ["-m", "kto_jax.train", f"--config={self._recipe}", *flags, f"--workdir={folder}"]

    def check(self) -> None:
        """Checks that there is something to train, and something to train on.

        Raises:
          ConfigError: there is not; says what is missing.
        """
        if self._why_not:
            raise ConfigError(self._why_not)
        found = self._presses.count()
        good = sum(found.get(press, 0) for press in ("up", "edit", "choice"))
        bad = sum(found.get(press, 0) for press in ("down", "edit", "choice"))
        if not good or not bad:
            raise ConfigError(
                f"{good} good and {bad} bad answers were pressed so far. Training on thumbs needs both. Press thumbs "
                f"{'down' if good else 'up'} on some answers, or edit one."
            )

    def run(self) -> Iterator[Progress]:
        """Trains, in a process of its own.

        Yields:
          How far it is, whenever that changes; the last one has the policy.

        Raises:
          ConfigError: nothing can be trained, a run is in progress, or the run failed; names its log.
        """
        with self._lock:
            if self.is_running:
                raise ConfigError("A training is running already. One runs at a time. Wait until it ends.")
            self.check()
            folder = self._next_folder()
            presses, log = (folder.with_name(f"{folder.name}.{ending}") for ending in ("jsonl", "log"))
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._presses.path, presses)
            command = self.command(folder, presses)
            with log.open("wb") as file:
                file.write(f"python {shlex.join(command)}\n".encode())
                file.flush()
                # Both processes may use one GPU, which a process otherwise takes whole.
                environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "COLUMNS": "120"}
                process = subprocess.Popen(
                    [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
                )
            self._process = process
        yield from self._watch(process, folder, log)

    def _watch(self, process: subprocess.Popen[bytes], folder: Path, log: Path) -> Iterator[Progress]:
        shown = None
        while True:
            ended = process.poll() is not None
            progress = _read(log)
            if progress != shown:
                yield progress
                shown = progress
            if ended:
                break
            time.sleep(_LOOK_SECONDS)
        if process.returncode != 0 or not (folder / "policy" / "config.json").is_file():
            said = " · ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_NUM_LINES:])
            raise ConfigError(
                f"The training ended with exit code {process.returncode}: {said}. {log} has all that it said. The "
                "presses are kept, and the model that answers is unchanged."
            )
        yield dataclasses.replace(progress, policy=folder)

    def _next_folder(self) -> Path:
        parent, number = self._presses.path.parent, 1
        while any(parent.glob(f"trained_{number:03}*")):
            number += 1
        return parent / f"trained_{number:03}"

    def close(self) -> None:
        """Ends a run that is in progress; the command at the top of its log resumes it."""
        if self._process is not None and self.is_running:
            self._process.terminate()
            self._process.wait()


def _read(log: Path) -> Progress:
    """The last line of a log, and the last step in it."""
    lines = [_TIME.sub("", line).strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines[1:] if line]
    steps = [found for line in lines if (found := _STEP.search(line))]
    step, num_steps = (int(number) for number in steps[-1].groups()) if steps else (0, 0)
    return Progress(lines[-1] if lines else "starting …", step, num_steps)
