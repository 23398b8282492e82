"""Builds the files of an index: rows stream through the tokenizing workers to disk, in source order."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from kto_jax.config import DataConfig
from kto_jax.data.index.conversions import convert
from kto_jax.data.index.manifest import by_source, statistics
from kto_jax.data.rows import files
from kto_jax.data.rows.files import SourceFile
from kto_jax.data.rows.records import Feedback, Preference, Record, completions_of, read_as
from kto_jax.data.rows.rejection import Rejection, Skipped
from kto_jax.data.rows.sources import Source
from kto_jax.data.tokens.encoded_rows import EncodedRows, Limits, encode_feedback, start_encoder
from kto_jax.data.tokens.tokenizer import TokenizerInfo
from kto_jax.data.workers import Workers
from kto_jax.progress import console, make_bar
from kto_jax.storage.atomic import write_text
from kto_jax.storage.sums import write_sums

FORMAT = 5
"""Version of the index's files, and of the rules by which rows are read: an index of older rules is built again."""
COLUMNS = (
    *("offsets", "prompt_lengths", "desirable", "weights", "scores", "rejected"),
    *("prompt_hashes", "splits", "places"),
)
_STREAMED = {
    "tokens": np.int32,
    "prompt_lengths": np.int32,
    "completion_lengths": np.int32,
    "prompt_hashes": np.uint64,
    "pair_hashes": np.uint64,
    "desirable": np.bool_,
    "weights": np.float32,
    # float64 until labels are decided: 0.7 in float32 is below a threshold of 0.7.
    "scores": np.float64,
    # Source and line, alternating.
    "places": np.int64,
    # Figures of every token (`shapes.SAMPLED`), with data.sampled_tokens.
    "sampled": np.float32,
}
"""Columns that are written while rows are read; the others depend on all rows together."""
_PROGRESS = "progress.json"
_SAVE_SECONDS = 5.0
_CHUNK = 256
"""Rows per task of a worker."""
_MAX_REASONS = 200
_MAX_PLACES = 50


def content_digest(tokens: np.ndarray, columns: Mapping[str, np.ndarray], sampled: np.ndarray | None = None) -> str:
    """SHA-256 of the tokens, their figures if there are any, and all columns, in their order."""
    digest = hashlib.sha256()
    figures = () if sampled is None else (sampled,)
    for array in (tokens, *figures, *(columns[name] for name in COLUMNS)):
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def settings(data: DataConfig) -> dict[str, Any]:
    """The configuration as the manifest stores it."""
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    for name in ("label_map", "roles", "rename"):
        fields[name] = dict(fields[name])
    # Indices of runs that are older than these fields have the same key.
    if not data.rename:
        del fields["rename"]
    if not data.sampled_tokens:
        del fields["sampled_tokens"]
    return json.loads(json.dumps(fields))


class Builder:
    """Streams rows to disk in constant memory; resumes a killed build.

    Args:
      directory: an empty folder, or one with an interrupted build of the same sources and settings.
      data: limits and splits.
      sources: the files, in order, each with its source's settings.
      tokenizer: the tokenizer.
      vocab_size: rows of the model's embedding.
    """

    def __init__(
        self,
        directory: Path,
        data: DataConfig,
        sources: Sequence[tuple[SourceFile, Source]],
        tokenizer: TokenizerInfo,
        vocab_size: int,
    ):
        self._directory, self._data, self._tokenizer, self._vocab_size = directory, data, tokenizer, vocab_size
        self._read_from = sources
        self._limits = Limits(data.max_length, data.max_prompt_length, data.long_completion, vocab_size)
        progress = _read_progress(directory)
        self._reasons = collections.Counter[str](progress["reasons"])
        self._first: list[dict[str, str]] = progress["first"]
        self._skips = collections.Counter[str](progress["skips"])
        self._encoding: dict[str, dict[str, int]] = progress["encoding"]
        self._sources: list[dict[str, Any]] = progress["sources"]
        self._num_finished: int = progress["finished"]
        self._saved = time.monotonic()
        for name in _STREAMED:
            _path(directory, name).touch()
            os.truncate(_path(directory, name), progress["sizes"].get(name, 0))
        self._files: dict[str, IO[bytes]] = {}

    def add_sources(self) -> None:
        """Reads and tokenizes all sources, in order."""
        bar = make_bar(console)
        with (
            contextlib.ExitStack() as streams,
            Workers(_num_workers(self._data.num_workers), start_encoder, self._tokenizer) as workers,
            console.showing(bar.get_renderable),
        ):
            for name in _STREAMED:
                self._files[name] = streams.enter_context(_path(self._directory, name).open("ab"))
            if done := sum(source["rows"] for source in self._sources):
                console.print(f"resuming a build that was interrupted after {done} rows")
            for file, source in self._read_from[self._num_finished :]:
                if len(self._sources) == self._num_finished:
                    counts = {"rows": 0, "accepted": 0, "skipped": 0, "rejected": 0}
                    self._sources.append({"name": file.name, "split": source.split, **counts})
                size = file.path.stat().st_size
                task = bar.add_task(f"reading {file.path.name}", total=size)
                console.draw()
                rows = files.read_rows(file, functools.partial(bar.wrap_file, task_id=task))
                reading = read_as(rows, source.data)
                self._sources[-1] |= {"layout": reading.layout, "fits": reading.fits, "warnings": reading.warnings}
                self._add_records(itertools.islice(reading.records, self._sources[-1]["rows"], None), workers)
                bar.update(task, completed=size)
                bar.remove_task(task)
                self._num_finished += 1
                self._save_progress()

    def _add_records(self, records: Iterator[Record], workers: Workers) -> None:
        pending: collections.deque[tuple[list[Record], Any]] = collections.deque()
        num_pending = 2 * _num_workers(self._data.num_workers)
        for chunk in iter(lambda: list(itertools.islice(records, _CHUNK)), []):
            usable = [record for record in chunk if isinstance(record, Feedback | Preference)]
            pending.append((chunk, workers.submit(encode_feedback, usable, self._limits)))
            # The number of pending chunks is bounded, so that a fast reader cannot fill the memory.
            while len(pending) > num_pending:
                self._write(*pending.popleft())
        while pending:
            self._write(*pending.popleft())

    def _write(self, records: list[Record], future: Any) -> None:
        encoded: EncodedRows = future.result()
        for (kind, name), count in encoded.counts.items():
            counted = self._encoding.setdefault(kind, {})
            counted[name] = counted.get(name, 0) + count
        reasons = iter(encoded.reasons)
        counts = self._sources[-1]
        accepted: list[Feedback] = []
        for record in records:
            if isinstance(record, Skipped):
                counts["skipped"] += 1
                self._skips[_known(record.reason, self._skips)] += 1
            elif isinstance(record, Rejection):
                self._reject(record.reason, record.place)
            elif (reason := next(reasons)) is not None:
                self._reject(reason, record.place)
            else:
                counts["accepted"] += 1
                accepted += completions_of(record)
        counts["rows"] += len(records)
        source = len(self._sources) - 1
        columns = {
            **vars(encoded),
            "desirable": [row.desirable for row in accepted],
            "weights": [row.weight for row in accepted],
            "scores": [row.score for row in accepted],
            "places": [(source, int(row.place.rpartition(":")[2])) for row in accepted],
        }
        for name, dtype in _STREAMED.items():
            self._files[name].write(np.asarray(columns[name], dtype).tobytes())
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self._save_progress()

    def _reject(self, reason: str, place: str) -> None:
        self._sources[-1]["rejected"] += 1
        self._reasons[_known(reason, self._reasons)] += 1
        if len(self._first) < _MAX_PLACES:
            self._first.append({"reason": reason, "place": place})

    def _save_progress(self) -> None:
        """Records the valid size of each file; a resumed build truncates the files to these sizes."""
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        progress = {
            "sources": self._sources,
            "finished": self._num_finished,
            "reasons": self._reasons,
            "skips": self._skips,
            "encoding": self._encoding,
            "first": self._first,
            "sizes": {name: stream.tell() for name, stream in self._files.items()},
        }
        write_text(self._directory / _PROGRESS, json.dumps(progress))
        self._saved = time.monotonic()

    def finish(self, key: str, digests: Sequence[str]) -> dict[str, Any]:
        """Writes the columns, the manifest and the digests of all files.

        Args:
          key: the index's key.
          digests: SHA-256 of each source.

        Returns:
          The manifest.
        """
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
            "skips": dict(self._skips.most_common()),
            "encoding": self._encoding,
        }
        if manifest["accepted"]:
            figures, trained = self._write_columns()
            manifest |= figures
            manifest["sources"] = [{**s, "train": t} for s, t in zip(manifest["sources"], trained, strict=True)]
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        unused = () if self._data.sampled_tokens else (_path(self._directory, "sampled"),)
        for path in (self._directory / _PROGRESS, *self._directory.glob("*.raw"), *unused):
            path.unlink(missing_ok=True)
        (self._directory / "manifest.json").write_text(text, encoding="utf-8")
        write_sums(self._directory)
        return manifest

    def _write_columns(self) -> tuple[dict[str, Any], list[dict[str, int]]]:
        """Writes the columns that depend on all rows; returns statistics for the manifest, in total and by source."""
        columns: dict[str, np.ndarray] = {
            name: np.memmap(_path(self._directory, name), dtype, mode="r")
            for name, dtype in _STREAMED.items()
            if name not in ("tokens", "sampled")
        }
        columns["splits"] = self._splits(columns)
        columns["sources"] = columns["places"][::2]
        converted, facts = convert(columns, self._data, [source for _, source in self._read_from])
        columns |= converted
        trained = by_source(columns, len(self._sources))
        figures = statistics(columns, self._data) | facts
        columns["places"] = columns["places"].reshape(-1, 2)
        columns["scores"] = columns["scores"].astype(np.float32)
        columns["offsets"] = np.zeros(len(columns["splits"]) + 1, np.int64)
        np.cumsum(columns["prompt_lengths"] + columns["completion_lengths"], out=columns["offsets"][1:])
        for name in COLUMNS:
            np.save(self._directory / f"{name}.npy", columns[name], allow_pickle=False)
        tokens = np.memmap(_path(self._directory, "tokens"), np.int32, mode="r")
        sampled = None
        if self._data.sampled_tokens:
            sampled = np.memmap(_path(self._directory, "sampled"), np.float32, mode="r")
        return {**figures, "content_sha256": content_digest(tokens, columns, sampled)}, trained

    def _splits(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Splits by the prompt's hash alone, so that all completions of a prompt share a split."""
        share = columns["prompt_hashes"] / 2.0**64
        has_eval = any(source["split"] == "eval" for source in self._sources)
        holdout = 0.0 if has_eval else self._data.holdout
        splits = np.where(share < holdout, 1, np.where(share < holdout + self._data.judge_holdout, 2, 0))
        from_eval = np.array([source["split"] == "eval" for source in self._sources])[columns["places"][::2]]
        return np.where(from_eval, 1, splits).astype(np.uint8)


def _known(reason: str, counts: collections.Counter[str]) -> str:
    """The reason, or "other reasons" if there are already too many different ones."""
    return reason if reason in counts or len(counts) < _MAX_REASONS else "other reasons"


def _read_progress(directory: Path) -> dict[str, Any]:
    """The progress of a killed build, or the start if its files are incomplete."""
    with contextlib.suppress(OSError, ValueError):
        progress = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))
        whole = all(_path(directory, name).stat().st_size >= size for name, size in progress["sizes"].items())
        if whole and "skips" in progress:
            return progress
    return {"sources": [], "finished": 0, "reasons": {}, "skips": {}, "first": [], "encoding": {}, "sizes": {}}


def _path(directory: Path, name: str) -> Path:
    return directory / (f"{name}.bin" if name in ("tokens", "sampled") else f"{name}.raw")


def _num_workers(num_workers: int | str) -> int:
    return max(1, min(os.cpu_count() or 1, 16) - 1) if num_workers == "auto" else max(1, int(num_workers))
