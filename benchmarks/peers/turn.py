"""A contender's turn: what it is told, and what it tells. Every environment has what it needs: Python alone."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    """The job file named on the command line; from here on, the process keeps to its share of the cores.

    XLA makes as many threads as it may use cores, torch as OMP_NUM_THREADS says, which the parent sets.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    # Where memory runs out, the contender that needs it is what the kernel ends.
    Path("/proc/self/oom_score_adj").write_text("1000")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    return job


def report(job: dict[str, Any], **figures: Any) -> None:
    """Writes the turn's figures where the parent looks for them, with the most memory the process ever held."""
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(job["result"]).write_text(json.dumps(figures))
