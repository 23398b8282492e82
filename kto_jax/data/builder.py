"""Makes the files of an index: rows stream through the tokenizing workers to disk, in source order."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import DataConfig
from kto_jax.data import files
from kto_jax.data.conversions import convert
from kto_jax.data.files import Rejection, SourceFile
from kto_jax.data.manifest import statistics
from kto_jax.data.records import Feedback, Preference, Record, Skipped, completions_of, records_of
from kto_jax.data.tokenize import EncodedRows, Limits, TokenizerInfo, Workers, encode_feedback

FORMAT = 3
"""Version of the index's files."""
COLUMNS = (
    *("offsets", "prompt_lengths", "desirable", "weights", "scores", "rejected"),
    *("prompt_hashes", "splits", "places"),
)
_CHUNK = 256
"""Rows that travel to a worker at once."""
_MAX_REASONS = 200
_MAX_PLACES = 50


def settings(data: DataConfig) -> dict[str, Any]:
    """The configuration as the manifest holds it."""
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    fields["label_map"] = dict(data.label_map)
    return json.loads(json.dumps(fields))


class Builder:
    """Streams rows to disk; only numbers of a fixed size per row stay in memory.

    Args:
      directory: an empty folder.
      data: fields, format, limits and splits.
      tokenizer: how text becomes ids.
      vocab_size: rows of the model's embedding.
    """

    def __init__(self, directory: Path, data: DataConfig, tokenizer: TokenizerInfo, vocab_size: int):
        self._directory, self._data, self._tokenizer, self._vocab_size = directory, data, tokenizer, vocab_size
        self._limits = Limits(data.max_length, data.max_prompt_length, data.long_completion, vocab_size)
        self._columns: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._reasons: collections.Counter[str] = collections.Counter()
        self._first: list[dict[str, str]] = []
        self._sources: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()

    def add_sources(self, sources: list[tuple[SourceFile, str]]) -> None:
        """Reads and tokenizes all sources, in order."""
        with (
            Workers(_num_workers(self._data.num_workers), self._tokenizer) as workers,
            (self._directory / "tokens.bin").open("wb") as tokens,
            _progress() as progress,
        ):
            self._tokens = tokens
            for file, split in sources:
                counts = {"rows": 0, "accepted": 0, "skipped": 0, "rejected": 0}
                self._sources.append({"name": file.name, "split": split, **counts})
                size = file.path.stat().st_size
                task = progress.add_task(f"reading {file.path.name}", total=size)
                rows = files.read_rows(file, functools.partial(progress.wrap_file, task_id=task))
                self._add_records(records_of(rows, self._data), workers)
                progress.update(task, completed=size)

    def _add_records(self, records: Iterator[Record], workers: Workers) -> None:
        pending: collections.deque[tuple[list[Feedback | Preference], Any]] = collections.deque()
        chunk: list[Feedback | Preference] = []
        num_pending = 2 * _num_workers(self._data.num_workers)
        for record in records:
            self._sources[-1]["rows"] += 1
            if isinstance(record, Skipped):
                self._sources[-1]["skipped"] += 1
            elif isinstance(record, Rejection):
                self._reject(record.reason, record.place)
            else:
                chunk.append(record)
            if len(chunk) == _CHUNK:
                pending.append((chunk, workers.submit(encode_feedback, chunk, self._limits)))
                chunk = []
            # Few chunks wait at a time, so that a fast reader cannot fill the memory.
            while len(pending) > num_pending:
                self._write(*pending.popleft())
        if chunk:
            pending.append((chunk, workers.submit(encode_feedback, chunk, self._limits)))
        while pending:
            self._write(*pending.popleft())

    def _write(self, records: list[Feedback | Preference], future: Any) -> None:
        encoded: EncodedRows = future.result()
        accepted: list[Feedback] = []
        for record, reason in zip(records, encoded.reasons, strict=True):
            if reason is None:
                self._sources[-1]["accepted"] += 1
                accepted += completions_of(record)
            else:
                self._reject(reason, record.place)
        source = len(self._sources) - 1
        content = encoded.tokens.astype("<i4").tobytes()
        self._tokens.write(content)
        self._digest.update(content)
        lines = [int(row.place.rpartition(":")[2]) for row in accepted]
        for name in ("prompt_lengths", "completion_lengths", "prompt_hashes", "pair_hashes"):
            self._append(name, getattr(encoded, name))
        self._append("desirable", np.array([row.desirable for row in accepted], bool))
        self._append("weights", np.array([row.weight for row in accepted], np.float32))
        # In full until the labels are decided: 0.7 in float32 is below a threshold of 0.7.
        self._append("scores", np.array([row.score for row in accepted], np.float64))
        self._append("places", np.array([[source, line] for line in lines], np.int64).reshape(-1, 2))

    def _append(self, name: str, values: np.ndarray) -> None:
        self._columns[name].append(values)

    def _reject(self, reason: str, place: str) -> None:
        self._sources[-1]["rejected"] += 1
        known = reason in self._reasons or len(self._reasons) < _MAX_REASONS
        self._reasons[reason if known else "other reasons"] += 1
        if len(self._first) < _MAX_PLACES:
            self._first.append({"reason": reason, "place": place})

    def finish(self, key: str, digests: Sequence[str]) -> dict[str, Any]:
        """Writes the columns and the manifest.

        Args:
          key: names the content.
          digests: SHA-256 of each source.

        Returns:
          The manifest.
        """
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        manifest = {
            "format": FORMAT,
            "key": key,
            "tokenizer": {
                name: getattr(self._tokenizer, name) for name in ("sha256", "vocab_size", "bos_id", "eos_id")
            },
            "vocab_size": self._vocab_size,
            "data": settings(self._data),
            "sources": [{**s, "sha256": d} for s, d in zip(self._sources, digests, strict=True)],
            **{n: sum(s[n] for s in self._sources) for n in ("rows", "accepted", "skipped", "rejected")},
            "rejections": {"histogram": dict(self._reasons.most_common()), "first": self._first},
        }
        if manifest["accepted"]:
            columns["splits"] = self._splits(columns)
            converted, facts = convert(columns, self._data)
            columns |= converted
            columns["scores"] = columns["scores"].astype(np.float32)
            columns["offsets"] = np.concatenate(
                [[0], np.cumsum(columns["prompt_lengths"] + columns["completion_lengths"], dtype=np.int64)]
            )
            manifest |= statistics(columns, self._data) | facts
            for name in COLUMNS:
                np.save(self._directory / f"{name}.npy", columns[name], allow_pickle=False)
                self._digest.update(np.ascontiguousarray(columns[name]).tobytes())
            manifest["content_sha256"] = self._digest.hexdigest()
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self._directory / "manifest.json").write_text(text, encoding="utf-8")
        return manifest

    def _splits(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Decided by the prompt's hash alone: all completions of a prompt share a split, whatever else is read."""
        share = columns["prompt_hashes"] / 2.0**64
        has_eval = any(source["split"] == "eval" for source in self._sources)
        holdout = 0.0 if has_eval else self._data.holdout
        splits = np.where(share < holdout, 1, np.where(share < holdout + self._data.judge_holdout, 2, 0))
        from_eval = np.array([source["split"] == "eval" for source in self._sources])[columns["places"][:, 0]]
        return np.where(from_eval, 1, splits).astype(np.uint8)


def _num_workers(num_workers: int | str) -> int:
    return max(1, min(os.cpu_count() or 1, 16) - 1) if num_workers == "auto" else max(1, int(num_workers))


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
