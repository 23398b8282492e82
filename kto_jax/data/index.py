"""The index: every accepted row, tokenized once into memory-mapped files, and a manifest that explains them.

    tokens.bin              int32, prompt and completion of every row, one after the other
    offsets.npy             int64 [rows + 1], where each row begins in tokens.bin
    prompt_lengths.npy      int32, tokens of each row's prompt; the rest of the row is its completion
    desirable.npy           bool
    weights.npy             float32
    scores.npy              float32, 0 where the rows have none
    rejected.npy            int64, for the chosen row of a pair the row of its rejected completion, else -1
    prompt_hashes.npy       uint64, of the whole prompt
    splits.npy              uint8, position in SPLITS
    places.npy              int64 [rows, 2], which source of the manifest, and line
    manifest.json           counts, rejections with their places, lengths, digests

Rows lie in source order. The folder's name is a digest of everything that decides its content, so a matching index is
reopened at once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data import files
from kto_jax.data.files import Rejection, SourceFile
from kto_jax.data.manifest import SPLITS, check, statistics
from kto_jax.data.records import Feedback, Skipped, records_of
from kto_jax.data.tokenize import EncodedRows, Limits, TokenizerInfo, Workers, encode_feedback

_FORMAT = 2
_CHUNK = 256
"""Rows that travel to a worker at once."""
_COLUMNS = (
    *("offsets", "prompt_lengths", "desirable", "weights", "scores", "rejected"),
    *("prompt_hashes", "splits", "places"),
)
_MAX_REASONS = 200
_MAX_PLACES = 50


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index. Arrays are memory-mapped and read-only; a row id is a position in them.

    Attributes:
      directory: where it lies.
      manifest: counts, digests and configuration; `manifest["key"]` names the content.
      tokens: ids of all rows.
      offsets: where each row begins in `tokens`, and where the last ends.
      prompt_lengths: tokens of each row's prompt.
      desirable: thumbs-up.
      weights: how much each row counts.
      scores: rating of each row; 0 where the rows have none.
      rejected: for the chosen row of a pair, the row of its rejected completion; -1 elsewhere.
      prompt_hashes: equal where the prompts are equal.
      splits: position in `SPLITS`.
      places: source number and line of each row.
    """

    directory: Path
    manifest: dict[str, Any]
    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    desirable: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    rejected: np.ndarray
    prompt_hashes: np.ndarray
    splits: np.ndarray
    places: np.ndarray

    def rows(self, split: str) -> np.ndarray:
        """Row ids of "train", "eval", "judge" or "unused", in source order, int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def pairs(self, split: str) -> np.ndarray:
        """Row ids of the chosen completions of a split's pairs, in source order, int64."""
        rows = self.rows(split)
        return rows[self.rejected[rows] >= 0]

    def prompt(self, row: int) -> np.ndarray:
        """Ids of a row's prompt, closed by the generation prompt."""
        start = self.offsets[row]
        return self.tokens[start : start + self.prompt_lengths[row]]

    def completion(self, row: int) -> np.ndarray:
        """Ids of a row's completion, its EOS included (absent only where the completion was cut)."""
        return self.tokens[self.offsets[row] + self.prompt_lengths[row] : self.offsets[row + 1]]

    def place(self, row: int) -> str:
        """`file:line` that a row was read from."""
        source, line = self.places[row]
        return f"{self.manifest['sources'][source]['name']}:{line}"

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens of each row's completion."""
        return (np.diff(self.offsets) - self.prompt_lengths).astype(np.int32)


def build_index(data: DataConfig, tokenizer: TokenizerInfo, *, vocab_size: int, directory: Path) -> Index:
    """Reads, checks and tokenizes the feedback, or reopens the index of an earlier, equal call.

    Args:
      data: sources, fields, limits and splits.
      tokenizer: how text becomes ids.
      vocab_size: rows of the model's embedding; a row with a larger id is rejected.
      directory: where indices are kept, each in a folder of its own.

    Returns:
      The opened index.

    Raises:
      ConfigError: a source is missing or lacks a field, too many rows are rejected, no row is usable, only one label
        is left to train on, or a row of `data.eval` is also in `data.train`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sources = _find_sources(data, directory)
    digests = [file.sha256() for file, _ in sources]
    key = _key(
        data, tokenizer, vocab_size, [(digest, split) for digest, (_, split) in zip(digests, sources, strict=True)]
    )
    final = directory / key[:16]
    if not (final / "manifest.json").exists():
        with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as temporary:
            builder = _Builder(Path(temporary), data, tokenizer, vocab_size)
            builder.add_sources(sources)
            manifest = builder.finish(key, digests)
            check(manifest, data)
            _publish(Path(temporary), final)
    index = open_index(final)
    # max_rejected is not part of the key: it changes what is refused, not what is built.
    check(index.manifest, data)
    return index


def open_index(directory: Path) -> Index:
    """Opens an index that `build_index` wrote.

    Args:
      directory: the index's own folder.

    Returns:
      The index.

    Raises:
      ConfigError: no whole index of this version is there.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        columns = {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _COLUMNS}
        tokens = np.memmap(directory / "tokens.bin", np.int32, mode="r")
        whole = manifest["format"] == _FORMAT and len(tokens) == columns["offsets"][-1]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{directory} holds no readable index: {error}. Delete the folder to build it again."
        ) from error
    if not whole:
        raise ConfigError(
            f"{directory} holds an index that is cut or of another version. Version {_FORMAT} is read. "
            "Delete the folder to build it again."
        )
    return Index(directory, manifest, tokens, **columns)


def _find_sources(data: DataConfig, directory: Path) -> list[tuple[SourceFile, str]]:
    found = []
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for source in [sources] if isinstance(sources, str) else sources:
            if source.startswith("hub:"):
                found.append((_hub_file(source, directory / "hub"), split))
            elif source:
                found += [(file, split) for file in files.expand(source)]
    if not any(split == "train" for _, split in found):
        raise ConfigError(
            "data.train is empty. It takes files (.jsonl, .json, .csv, .parquet), globs, hub:org/name/split or "
            "wheel:NAME==VERSION/path. Set config.data.train."
        )
    return found


def _hub_file(source: str, directory: Path) -> SourceFile:
    """The Hub set as a local file, fetched once: a resumed run must see the same rows, and may be offline."""
    directory.mkdir(exist_ok=True)
    path = directory / (source.removeprefix("hub:").replace("/", "--") + ".jsonl")
    if not path.exists():
        with Workers(1) as workers:
            workers.submit(files.fetch_hub, source, path).result()
    return SourceFile(path, source)


def _key(data: DataConfig, tokenizer: TokenizerInfo, vocab_size: int, sources: list[tuple[str, str]]) -> str:
    settings = _settings(data)
    # Where the bytes lie, how many workers read them and how many may be broken do not change the content.
    for name in ("train", "eval", "max_rejected", "num_workers", "chat_template"):
        del settings[name]
    key = [_FORMAT, settings, tokenizer.sha256, vocab_size, sources]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _settings(data: DataConfig) -> dict[str, Any]:
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    fields["label_map"] = dict(data.label_map)
    return json.loads(json.dumps(fields))


def _publish(temporary: Path, final: Path) -> None:
    # A rename of the whole folder: a reader sees a finished index or none. The empty folder is for the context manager.
    try:
        os.rename(temporary, final)
    except OSError:
        if not (final / "manifest.json").exists():
            shutil.rmtree(final)
            os.rename(temporary, final)
            temporary.mkdir()
        return
    temporary.mkdir()


class _Builder:
    """Streams rows to disk; only numbers of a fixed size per row stay in memory."""

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

    def _add_records(self, records: Iterator[Feedback | Rejection | Skipped], workers: Workers) -> None:
        pending: collections.deque[tuple[list[Feedback], Any]] = collections.deque()
        chunk: list[Feedback] = []
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

    def _write(self, rows: list[Feedback], future: Any) -> None:
        encoded: EncodedRows = future.result()
        accepted = []
        for row, reason in zip(rows, encoded.reasons, strict=True):
            if reason is None:
                accepted.append(row)
            else:
                self._reject(reason, row.place)
        source = len(self._sources) - 1
        self._sources[source]["accepted"] += len(accepted)
        content = encoded.tokens.astype("<i4").tobytes()
        self._tokens.write(content)
        self._digest.update(content)
        lines = [int(row.place.rpartition(":")[2]) for row in accepted]
        self._append("prompt_lengths", encoded.prompt_lengths)
        self._append("completion_lengths", encoded.completion_lengths)
        self._append("prompt_hashes", encoded.prompt_hashes)
        self._append("pair_hashes", encoded.pair_hashes)
        self._append("desirable", np.array([row.desirable for row in accepted], bool))
        self._append("weights", np.array([row.weight for row in accepted], np.float32))
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
        """Writes the columns and the manifest, and returns the manifest."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        manifest = {
            "format": _FORMAT,
            "key": key,
            "tokenizer": {
                name: getattr(self._tokenizer, name) for name in ("sha256", "vocab_size", "bos_id", "eos_id")
            },
            "vocab_size": self._vocab_size,
            "data": _settings(self._data),
            "sources": [{**s, "sha256": d} for s, d in zip(self._sources, digests, strict=True)],
            **{n: sum(s[n] for s in self._sources) for n in ("rows", "accepted", "skipped", "rejected")},
            "rejections": {"histogram": dict(self._reasons.most_common()), "first": self._first},
        }
        if manifest["accepted"]:
            columns["splits"] = self._splits(columns)
            columns["scores"] = np.zeros(manifest["accepted"], np.float32)
            columns["rejected"] = np.full(manifest["accepted"], -1, np.int64)
            columns["offsets"] = np.concatenate(
                [[0], np.cumsum(columns["prompt_lengths"] + columns["completion_lengths"], dtype=np.int64)]
            )
            manifest |= statistics(columns, self._data)
            for name in _COLUMNS:
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
