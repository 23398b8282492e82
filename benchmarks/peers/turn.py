"""The job and the results of a contender's process. Needs only Python, so it works in every environment."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    """Reads the job file named on the command line, and limits the process to its share of the cores.

    XLA uses as many threads as it has cores; torch uses OMP_NUM_THREADS, which the parent sets.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    # If memory runs out, the kernel should kill the contender that needs it.
    Path("/proc/self/oom_score_adj").write_text("1000")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    return job


def report(job: dict[str, Any], **figures: Any) -> None:
    """Writes the figures for the parent, with the process's peak memory."""
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(job["result"]).write_text(json.dumps(figures))
