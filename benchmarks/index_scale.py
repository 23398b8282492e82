"""Cost of an index of many rows: building, reopening, and scheduling steps.

    python -m benchmarks.index_scale                          # a million short rows, through the real build
    python -m benchmarks.index_scale --rows=10_000_000
    python -m benchmarks.index_scale --rows=10_000_000 --encoded    # all but tokenizing, which is linear in the rows

Rows are synthetic: a prompt and a completion of a few words, four completions per prompt. The tokenizer is that of
configs/tiny_model, by default without a chat template. Memory is the resident memory of this process and its workers,
sampled ten times a second. Pages of memory-mapped files, which the system can reclaim at any time, are counted
separately.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kto_jax.config import DataConfig
from kto_jax.data.batches.packing import RowLimits
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.index import builder
from kto_jax.data.index.index import build_index, open_index
from kto_jax.data.rows.records import Feedback
from kto_jax.data.tokens.encoded_rows import EncodedRows
from kto_jax.data.tokens.prepare import prepare_tokenizer

TINY_MODEL = Path(__file__).parent.parent / "configs" / "tiny_model"


def write_rows(path: Path, count: int) -> None:
    """Writes a JSONL file of short rows."""
    with path.open("w") as file:
        for i in range(count):
            row = {"prompt": f"What is {i // 4}?", "completion": f"It is {i * 7 % 1000}.", "label": i % 3 == 0}
            file.write(json.dumps(row) + "\n")


class Memory:
    """Peak memory of this process and its children, in bytes: private, and including mapped files."""

    private, resident = 0, 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Samples the memory until the body ends."""
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.1):
            pids = [os.getpid(), *_descendants(os.getpid())]
            figures = [_memory(pid) for pid in pids]
            self.private = max(self.private, sum(private for private, _ in figures))
            self.resident = max(self.resident, sum(resident for _, resident in figures))


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _memory(pid: int) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        return kibibytes["RssAnon"] << 10, sum(kibibytes.values()) << 10
    return 0, 0


class EncodedWorkers:
    """Replaces the tokenizing processes: every row has four prompt ids and three completion ids."""

    def __init__(self, *_: object) -> None:
        self._count = 0

    def __enter__(self) -> EncodedWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, _: object, rows: list[Feedback], *__: object) -> concurrent.futures.Future:
        """Encodes immediately."""
        numbers = np.arange(self._count, self._count + len(rows), dtype=np.uint64)
        self._count += len(rows)
        # Multiplied by an odd number: hashes that look random, and are equal if the prompts are.
        hashes = (numbers // np.uint64(4) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        future: concurrent.futures.Future = concurrent.futures.Future()
        lengths = np.full(len(rows), 4, np.int32)
        tokens = np.full(7 * len(rows), 5, np.int32)
        future.set_result(EncodedRows([None] * len(rows), tokens, lengths, lengths - 1, hashes, hashes + numbers))
        return future


def measure(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """Builds, reopens and schedules; figures in seconds, bytes and microseconds."""
    tokenizer = prepare_tokenizer(TINY_MODEL, directory / "tokenizer", chat_template=options.chat_template)
    source = directory / "rows.jsonl"
    write_rows(source, options.rows)
    time.sleep(3)  # the digest of a file that was just written is cached only at the next request
    data = DataConfig(train=str(source), max_length=64, holdout=0.01, num_workers=options.workers)
    settings = {"vocab_size": 512, "directory": directory / "indices"}
    memory, figures = Memory(), {"rows": float(options.rows), "source_bytes": float(source.stat().st_size)}

    def timed(name: str, function, *arguments, **keywords):
        start = time.perf_counter()
        result = function(*arguments, **keywords)
        figures[name] = time.perf_counter() - start
        return result

    finish = builder.Builder.finish
    builder.Builder.finish = lambda *arguments: timed("finish_seconds", finish, *arguments)
    if options.encoded:
        builder.Workers = EncodedWorkers
    with memory.watched():
        index = timed("build_seconds", build_index, data, tokenizer, **settings)
    figures |= {"build_private_bytes": memory.private, "build_resident_bytes": memory.resident}
    figures["rows_per_second"] = options.rows / figures["build_seconds"]
    figures["index_bytes"] = sum(path.stat().st_size for path in index.directory.iterdir())
    timed("reopen_seconds", open_index, index.directory)
    timed("find_and_reopen_seconds", build_index, data, tokenizer, **settings)
    with memory.watched():
        train = timed("sequences_seconds", index.sequences, "train")
        limits = RowLimits((256,), completion_length=256, microbatch_rows=1, max_length=64)
        schedule = timed("schedule_seconds", Schedule, index, train, Order(256, seed=0), limits)
    figures["schedule_private_bytes"] = max(memory.private, 0)
    for name, function in (("step", schedule.step), ("batch", schedule.batch)):
        function(0)
        steps = np.linspace(0, schedule.num_steps - 1, 50).astype(int)
        timed(f"{name}_microseconds", lambda function=function, steps=steps: [function(int(s)) for s in steps])
        figures[f"{name}_microseconds"] *= 1e6 / len(steps)
    return figures


def main() -> None:
    """Prints the table and writes it to benchmarks/results/index_scale.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--chat_template", default="none", choices=["none", "auto"])
    parser.add_argument("--encoded", action="store_true")
    parser.add_argument("--directory", default=None, help="where the rows and the index lie meanwhile")
    parser.add_argument("--out", default="benchmarks/results/index_scale.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        figures = measure(Path(directory), options)
    table = Table("figure", "value", title=f"{options.rows:,} rows")
    for name, value in figures.items():
        table.add_row(name, f"{value / 2**20:,.0f} MiB" if name.endswith("bytes") else f"{value:,.3f}")
    Console().print(table)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**vars(options), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
