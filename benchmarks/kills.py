"""Kills a run of 200 steps again and again, on a disk and in a bucket, and compares it with an uninterrupted one.

    python -m benchmarks.kills              # 20 kills and 10 storms of SIGTERM in each place: about 20 minutes
    python -m benchmarks.kills --kills=8 --storms=2 --steps=100
    python -m benchmarks.kills --kills=0 --places=disk           # 10 storms on a disk; other rows of the table stay

SIGKILL comes at chosen steps (before the first, after the first, in the middle of an epoch, at its end, before the
last, after the last) and at random moments, during saves among others. In a storm, SIGTERM comes every 20 ms until the
process ends. The bucket is that of a server on this machine. The table is written into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import PAGE, replace_part
from benchmarks.tiny_run import STEPS_PER_EPOCH, TinyRun, opened

BEGIN, END = "<!-- kills: begin -->", "<!-- kills: end -->"
_HEAD = "| where | injected | survived | steps lost | the result |\n|---|---|---|---|---|\n"
_LONGEST_LIFE = 1.5
"""Seconds after a life's first step within which the random kills fall."""


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
      survived: injuries after which the same command went on.
      lost: the most steps that had to be repeated.
      is_equal: whether the result is bitwise that of the uninterrupted run.
    """

    survived: int
    lost: int
    is_equal: bool


def kill(run: TinyRun, count: int, chance: random.Random) -> tuple[int, int]:
    """Kills a run this many times, and lets it finish; returns how often it went on, and the most steps repeated."""
    last = run.num_steps
    chosen = [0, 1, STEPS_PER_EPOCH // 2, STEPS_PER_EPOCH, None, last - 1, last]
    chosen[4:5] = [None] * (count - len(chosen) + 1)
    survived = lost = before = 0
    for step in chosen:
        process = run.start()
        if step == 0:
            run.wait_for_state(process)
        elif step is not None:
            run.wait_for_rows(step, process)
        else:
            run.wait_for_rows(before + 1, process)
            time.sleep(chance.uniform(0, _LONGEST_LIFE))
        process.kill()
        survived += process.wait() == -signal.SIGKILL
        before = max(run.num_rows(), before)
        lost = max(lost, before - max(run.steps(), default=0))
        print(f"{run.workdir}: killed after step {before}, checkpoints {run.steps()}", flush=True)
    run.finish()
    return survived, lost


def storm(run: TinyRun, count: int, chance: random.Random) -> tuple[int, int]:
    """Sends SIGTERM every 20 ms until the process ends, this many times, and lets the run finish; see `kill`."""
    survived = lost = before = 0
    for _ in range(count):
        process = run.start()
        run.wait_for_rows(before + 1, process)
        time.sleep(chance.uniform(0, _LONGEST_LIFE))
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        before, newest = run.num_rows(), max(run.steps(), default=0)
        survived += process.returncode == 75 and newest == before
        lost = max(lost, before - newest)
        print(f"{run.workdir}: exit code {process.returncode} after step {before}, checkpoint {newest}", flush=True)
    run.finish()
    return survived, lost


def measure(
    folder: Path, num_steps: int, counts: dict[str, int], places: list[str], seed: int
) -> Iterator[tuple[str, str, Outcome]]:
    """Injures runs in each place; yields the place, the signal and what became of the run."""
    unbroken = TinyRun(folder / "unbroken", num_steps)
    unbroken.finish()
    for name, injure in (("SIGKILL", kill), ("SIGTERM", storm)):
        for kind in places if counts[name] else ():
            with opened(kind, folder / f"{kind}_{name}", num_steps) as run:
                survived, lost = injure(run, counts[name], random.Random(seed))
                yield kind, name, Outcome(survived, lost, run.is_equal_to(unbroken))


def _rows(page: str) -> dict[tuple[str, str], str]:
    """The rows of the table in a page, by place and signal."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    found = re.finditer(r"^\| (disk|bucket) \| \d+ times (SIG\w+).*\|$", table, re.MULTILINE)
    return {(match[1], match[2]): match[0] + "\n" for match in found}


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--storms", type=int, default=10)
    parser.add_argument("--places", default="disk,bucket")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="", help="keeps the runs, and reuses its uninterrupted one")
    options = parser.parse_args()
    started, is_well, rows = time.monotonic(), True, _rows(PAGE.read_text(encoding="utf-8"))
    counts = {"SIGKILL": options.kills, "SIGTERM": options.storms}
    texts = {"SIGKILL": "SIGKILL", "SIGTERM": "SIGTERM every 20 ms until the end"}
    with tempfile.TemporaryDirectory(prefix="kto_jax-kills-") as scratch:
        folder = Path(options.folder or scratch)
        for kind, name, found in measure(folder, options.steps, counts, options.places.split(","), options.seed):
            is_well &= found.is_equal and found.survived == counts[name]
            rows[kind, name] = (
                f"| {kind} | {counts[name]} times {texts[name]} | {found.survived} of {counts[name]} | at most "
                f"{found.lost} | {'bitwise that' if found.is_equal else 'NOT that'} of an uninterrupted run, metrics "
                "and policy |\n"
            )
            print(rows[kind, name], flush=True)
    summary = (
        f"Last run: {datetime.date.today()}, `python -m benchmarks.kills --kills={options.kills} "
        f"--storms={options.storms} --places={options.places} --steps={options.steps}` in "
        f"{time.monotonic() - started:.0f} s; {options.steps} steps, a checkpoint every 5."
    )
    replace_part(PAGE, BEGIN, END, f"{summary}\n\n{_HEAD}{''.join(rows.values())}")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())
