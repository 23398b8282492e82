"""Trains the tiny model while everything fails at random, and compares the result with an undisturbed run.

    python -m benchmarks.soak                 # an hour
    python -m benchmarks.soak --minutes=30 --places=disk     # half an hour on a disk; the other row of the table stays

Half of the time the run is on a disk, half in a bucket of a server on this machine. Its length grows until the time is
up. Injected are, at random moments: SIGKILL; SIGTERM; a flipped bit in the newest checkpoint of a run that was just
killed; a full disk, which is a limit to the size of files for a second or two that checkpoints exceed; and a bucket
that answers with 429 or 503, closes connections or does not answer, for up to 20 s. In calm stretches of up to a minute
only the last two are injected, which a process survives; memory and open files are compared between their start and
their end.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import PAGE, replace_part
from benchmarks.tiny_run import BucketRun, TinyRun, opened

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
ROUND = 100
"""Steps that a life may take at least."""
CALM = 300
"""The same before a calm stretch."""
_STRETCH_SECONDS, _LOOK_SECONDS = 60.0, 2.0
_ROOM = 100_000
"""Bytes by which metrics may grow while the disk is full; a checkpoint is larger."""
_NOTED = ("is not saved", "the one before had failed", "trying again in", "has not answered", "moved to")
"""What is counted in the output of the processes."""


class Use(NamedTuple):
    """What a process holds: resident memory in MB, and open files."""

    memory: float
    files: int


def use_of(process: subprocess.Popen[bytes]) -> Use | None:
    """Reads what a process holds at least in two seconds: a save that is under way holds the state once more.

    Returns:
      None if the process ended.
    """
    place, found, end = Path(f"/proc/{process.pid}"), [], time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            return None
        pages = int((place / "statm").read_text().split()[1])
        found.append(Use(pages * resource.getpagesize() / 1e6, len(list((place / "fd").iterdir()))))
        time.sleep(0.05)
    return Use(min(use.memory for use in found), min(use.files for use in found))


class Soak:
    """A run and what is done to it.

    Attributes:
      counts: how often each fault was injected, and how processes ended.
      growth: of memory and open files, in each calm stretch.
    """

    def __init__(self, run: TinyRun, chance: random.Random) -> None:
        self.run, self.chance = run, chance
        self.counts: collections.Counter[str] = collections.Counter()
        self.growth: list[Use] = []
        self._is_calm = False

    def last(self, seconds: float) -> None:
        """Disturbs the run for this long, then lets it end its round."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before, is_calm = self.run.num_rows(), not self._is_calm
            # No longer than the next life may need, because all that is left is trained when the time is up.
            self.run.num_steps = max(self.run.num_steps, before + (CALM if is_calm else ROUND))
            process = self.run.start()
            if self.run.wait_for_rows(before + 1, process):
                self._disturb(process, end)
            self.counts[f"exit code {process.wait()}"] += 1
            steps = f"step {self.run.num_rows()} of {self.run.num_steps}, checkpoints {self.run.steps()}"
            print(f"{self.run.workdir}: exit code {process.returncode} after {steps}; {dict(self.counts)}", flush=True)
            if process.returncode not in (0, 1, 75, -signal.SIGKILL):
                raise RuntimeError(f"exit code {process.returncode}: {self.run.tail()}")
        self.run.finish()

    def _disturb(self, process: subprocess.Popen[bytes], end: float) -> None:
        self._is_calm = not self._is_calm
        if self._is_calm:
            self._calm_stretch(process, min(end, time.monotonic() + _STRETCH_SECONDS))
            return
        time.sleep(self.chance.uniform(0, 3))
        match self.chance.choice(["kill", "kill and flip", "term"]):
            case "term":
                self.counts["SIGTERM"] += process.poll() is None
                process.terminate()
            case what:
                self.counts["SIGKILL"] += process.poll() is None
                process.kill()
                process.wait()
                if what == "kill and flip":
                    self._flip()

    def _flip(self) -> None:
        """Flips a bit of the newest checkpoint, if there is one to fall back to."""
        steps = self.run.steps()
        if len(steps) < 2:
            return
        files = sorted(
            path for path in (self.run.path / f"checkpoints/{steps[-1]}/state/d").iterdir() if path.is_file()
        )
        path = self.chance.choice(files)
        data = bytearray(path.read_bytes())
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(bytes(data))
        self.counts["flipped bit"] += 1

    def _calm_stretch(self, process: subprocess.Popen[bytes], end: float) -> None:
        """Injects what a process survives; notes how its memory and open files grow."""
        time.sleep(5)  # for the first checkpoint, which loads what saves need
        first = latest = use_of(process)
        while process.poll() is None and time.monotonic() < end:
            if isinstance(self.run, BucketRun) and self.chance.random() < 0.7:
                self._outage(self.run)
            else:
                self._full_disk(process)
            time.sleep(self.chance.uniform(0, 3))
            # Not of its end, when it writes the policy and the report.
            if (found := use_of(process)) and self.run.num_rows() < self.run.num_steps:
                latest = found
        if first and latest:
            self.growth.append(Use(latest.memory - first.memory, latest.files - first.files))
        if process.poll() is None:
            process.terminate()
            self.counts["SIGTERM"] += 1

    def _outage(self, run: BucketRun) -> None:
        mode = self.chance.choice([429, 503, "reset", "silent"])
        run.proxy.set(mode)
        time.sleep(self.chance.uniform(1, 20))
        run.proxy.set("pass")
        self.counts[f"bucket: {mode}"] += 1

    def _full_disk(self, process: subprocess.Popen[bytes]) -> None:
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        logs = [path for copy in self.run.copies() for path in (copy / "metrics.jsonl", *copy.glob("tensorboard/*"))]
        largest = max((path.stat().st_size for path in logs if path.exists()), default=0)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest + _ROOM, before[1]))
        time.sleep(self.chance.uniform(0.5, 2))
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
        self.counts["full disk"] += 1


def soak(folder: Path, minutes: float, places: Sequence[str], seed: int) -> Iterator[tuple[str, str, bool]]:
    """Disturbs a run in each place, all places as long.

    Yields:
      The place, its row of the table, and whether its result is that of an undisturbed run.
    """
    for kind in places:
        with opened(kind, folder / kind, ROUND) as run:
            soaked = Soak(run, random.Random(seed))
            soaked.last(60 * minutes / len(places))
            undisturbed = TinyRun(folder / f"undisturbed_{kind}", run.num_steps, every=100)
            undisturbed.finish()
            is_equal = run.is_equal_to(undisturbed)
        injected = ", ".join(f"{count} × {name}" for name, count in sorted(soaked.counts.items()) if "exit" not in name)
        ends = ", ".join(f"{count} × {name[10:]}" for name, count in sorted(soaked.counts.items()) if "exit" in name)
        memory = ", ".join(f"{use.memory:+.0f}" for use in soaked.growth) or "no stretch"
        files = ", ".join(f"{use.files:+d}" for use in soaked.growth) or "no stretch"
        said = run.log.read_text(errors="replace")
        noted = ", ".join(f"{said.count(text)} × “{text}”" for text in _NOTED if text in said)
        result = "bitwise equal" if is_equal else "NOT EQUAL"
        cells = (
            f"{kind}, {minutes / len(places):g} min",
            str(run.num_steps),
            injected,
            ends,
            noted,
            result,
            memory,
            files,
        )
        yield kind, f"| {' | '.join(cells)} |\n", is_equal


def _rows(page: str) -> dict[str, str]:
    """The rows of the table in a page, by place."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    return {match[1]: match[0] + "\n" for match in re.finditer(r"^\| (disk|bucket), .*\|$", table, re.MULTILINE)}


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--places", default="disk,bucket")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows, all_equal = _rows(PAGE.read_text(encoding="utf-8")), True
    with tempfile.TemporaryDirectory(prefix="kto_jax-soak-") as folder:
        for kind, row, is_equal in soak(Path(folder), options.minutes, options.places.split(","), options.seed):
            rows[kind], all_equal = row, all_equal and is_equal
            print(row, flush=True)
    head = (
        "| where | steps | injected | exit codes | said | metrics and policy | growth of memory, MB | open "
        "files |\n|---|---|---|---|---|---|---|---|\n"
    )
    summary = (
        f"Last run: {datetime.date.today()}, `python -m benchmarks.soak --minutes={options.minutes:g} "
        f"--places={options.places}`."
    )
    replace_part(PAGE, BEGIN, END, f"{summary}\n\n{head}{''.join(rows.values())}")
    return int(not all_equal)


if __name__ == "__main__":
    sys.exit(main())
