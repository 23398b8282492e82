"""The index: every accepted completion, tokenized once into memory-mapped files, with a manifest.

A row of the index is one completion with its prompt; a pair is two rows, chosen and rejected.

    tokens.bin              int32, prompt and completion of every row, concatenated
    offsets.npy             int64 [rows + 1], start of each row in tokens.bin
    prompt_lengths.npy      int32, tokens of each row's prompt; the rest of the row is its completion
    desirable.npy           bool
    weights.npy             float32
    scores.npy              float32, 0 if the rows have none
    rejected.npy            int64, for the chosen row of a pair the row of its rejected completion, else -1
    prompt_hashes.npy       uint64, of the whole prompt
    splits.npy              uint8, position in SPLITS
    places.npy              int64 [rows, 2], source in the manifest, and line
    sampled.bin             float32 [tokens, figures], of every token; only with `data.sampled_tokens`
    manifest.json           counts, rejections with their places, lengths, digests
    SHA256SUMS              digests of these files, compared whenever the index is opened

Rows are in source order. A row is in the split "unused" if its score gives no label, or if `one_per_prompt` keeps
another row of its prompt. The folder's name is a digest of everything that determines its content, so a matching index
is reopened at once, or built again if it is damaged. If two runs build the same index, one waits; an interrupted build
is resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.index.build_folder import build_folder, is_finished, remove_damaged
from kto_jax.data.index.builder import COLUMNS, FORMAT, Builder, content_digest, settings
from kto_jax.data.index.manifest import SPLITS, check, with_weights
from kto_jax.data.index.shared_store import IndexStore
from kto_jax.data.rows import files
from kto_jax.data.rows.files import SourceFile
from kto_jax.data.rows.sources import Source, sources_of
from kto_jax.data.tokens.tokenizer import TokenizerInfo
from kto_jax.data.workers import Workers
from kto_jax.shapes import SAMPLED
from kto_jax.storage.hub import pinned
from kto_jax.storage.sums import damage_of, has_sums


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index. Arrays are memory-mapped and read-only; a row id is a position in them.

    Attributes:
      directory: its folder.
      manifest: counts, digests and configuration; `manifest["key"]` names the content.
      tokens: ids of all rows.
      offsets: start of each row in `tokens`, and the end of the last.
      prompt_lengths: tokens of each row's prompt.
      desirable: thumbs-up.
      weights: weight of each row.
      scores: rating of each row; 0 if the rows have none.
      rejected: for the chosen row of a pair, the row of its rejected completion; -1 elsewhere.
      prompt_hashes: equal if the prompts are equal.
      splits: position in `SPLITS`.
      places: source number and line of each row.
      sampled: figures of every token, in the order of `shapes.SAMPLED`; None without `data.sampled_tokens`.
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
    sampled: np.ndarray | None = None

    def sequences(self, split: str) -> np.ndarray:
        """Ids of the sequences of "train", "eval", "judge" or "unused", in source order, int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def pairs(self, split: str) -> np.ndarray:
        """Ids of the chosen sequences of a split's pairs, in source order, int64."""
        ids = self.sequences(split)
        return ids[self.rejected[ids] >= 0]

    def prompt(self, row: int) -> np.ndarray:
        """Ids of a row's prompt, including the generation prompt at its end."""
        start = self.offsets[row]
        return self.tokens[start : start + self.prompt_lengths[row]]

    def completion(self, row: int) -> np.ndarray:
        """Ids of a row's completion, including its EOS (absent only if the completion was truncated)."""
        return self.tokens[self.offsets[row] + self.prompt_lengths[row] : self.offsets[row + 1]]

    def sampled_figures(self, row: int) -> np.ndarray:
        """Figures of each token of a row's completion [completion, figures]; only with `data.sampled_tokens`."""
        assert self.sampled is not None
        return self.sampled[self.offsets[row] + self.prompt_lengths[row] : self.offsets[row + 1]]

    def place(self, row: int) -> str:
        """`file:line` that a row was read from."""
        source, line = self.places[row]
        return f"{self.manifest['sources'][source]['name']}:{line}"

    def num_completion(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the completions of some rows, int32."""
        return (self.offsets[rows + 1] - self.offsets[rows] - self.prompt_lengths[rows]).astype(np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path: another process opens the files again."""
        return _reopen, (self.directory, self.manifest)

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens of each row's completion."""
        return (np.diff(self.offsets) - self.prompt_lengths).astype(np.int32)


def build_index(
    data: DataConfig, tokenizer: TokenizerInfo, *, vocab_size: int, directory: Path, builds: bool = True
) -> Index:
    """Reads, checks and tokenizes the feedback, or reopens the index of an earlier call with equal inputs.

    Args:
      data: sources, fields, limits and splits.
      tokenizer: the tokenizer.
      vocab_size: rows of the model's embedding; a row with a larger id is rejected.
      directory: folder of all indices, each in its own subfolder.
      builds: whether this process builds an index that `data.index_store` lacks; the others wait for it.

    Returns:
      The opened index.

    Raises:
      ConfigError: a source is missing or lacks a field, too many rows are rejected, no row is usable, or a row
        of `data.eval` is also in `data.train`; or the store cannot be used.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sources = _find_sources(data, directory)
    digests = [file.sha256() for file, _ in sources]
    key = _key(data, tokenizer, vocab_size, [source for _, source in sources], digests)
    final = directory / key[:16]

    index = _find_index(final)
    store = IndexStore(data.index_store) if data.index_store else None
    if store is not None and not builds and index is None:
        # Not under the lock, which the building process may hold on this host.
        store.wait(key, lambda: is_finished(final))
    publishing = store.publishing(key, final) if store is not None and builds else contextlib.nullcontext()
    with publishing, build_folder(final) as folder:
        if folder is not None and store is not None and (contents := store.find(key)):
            store.copy(key, contents, folder)
        elif folder is not None:
            builder = Builder(folder, data, sources, tokenizer, vocab_size)
            builder.add_sources()
            check(builder.finish(key, digests), data)

    index = index or open_index(final)
    # max_rejected is not part of the key: it does not change the index, only whether it is refused.
    check(index.manifest, data)
    # Nor are weights, which only change how often sequences are visited; the manifest gets this call's weights.
    weights = [source.weight for _, source in sources]
    return dataclasses.replace(index, manifest=with_weights(index.manifest, settings(data), weights))


def open_index(directory: Path) -> Index:
    """Opens an index that `build_index` wrote.

    Args:
      directory: the index's folder.

    Returns:
      The index.

    Raises:
      ConfigError: the folder holds no complete index of this version, or its files differ from their digests.
    """
    directory = Path(directory)
    damage = damage_of(directory)
    if not damage:
        index = _open_files(directory)
        if has_sums(directory) or _content_is_whole(index):
            return index
        damage = "its columns differ from content_sha256 in manifest.json"
    raise ConfigError(f"{directory} holds a damaged index: {damage}. Delete the folder to build it again.")


def _find_index(final: Path) -> Index | None:
    """The finished index, or None if there is none; removes one that is damaged.

    Raises:
      ConfigError: it is damaged and cannot be removed.
    """
    if not is_finished(final):
        return None
    try:
        return open_index(final)
    except ConfigError as error:
        print(f"warning: {error} It is built again now.", file=sys.stderr)
        remove_damaged(final, lambda: is_finished(final) and not _is_whole(final))
        return None


def _is_whole(directory: Path) -> bool:
    with contextlib.suppress(ConfigError):
        open_index(directory)
        return True
    return False


def _content_is_whole(index: Index) -> bool:
    """Compares with the one digest of all columns that versions without SHA256SUMS recorded."""
    columns = {name: getattr(index, name) for name in COLUMNS}
    return content_digest(index.tokens, columns, index.sampled) == index.manifest.get("content_sha256")


def _open_files(directory: Path) -> Index:
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        columns = {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS}
        tokens = np.memmap(directory / "tokens.bin", np.int32, mode="r")
        sampled = None
        if manifest["data"].get("sampled_tokens"):
            sampled = np.memmap(directory / "sampled.bin", np.float32, mode="r").reshape(len(tokens), len(SAMPLED))
        whole = manifest["format"] == FORMAT and len(tokens) == columns["offsets"][-1]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{directory} holds no readable index: {error}. Delete the folder to build it again."
        ) from error
    if not whole:
        raise ConfigError(
            f"{directory} holds an index that is incomplete or of another version. Only version {FORMAT} is supported. "
            "Delete the folder to build it again."
        )
    return Index(directory, manifest, tokens, **columns, sampled=sampled)


def _reopen(directory: Path, manifest: dict[str, Any]) -> Index:
    return dataclasses.replace(_open_files(directory), manifest=manifest)


def _find_sources(data: DataConfig, directory: Path) -> list[tuple[SourceFile, Source]]:
    """Every file to read, in order, with its source."""
    found: list[tuple[SourceFile, Source]] = []
    for source in sources_of(data):
        if source.path.startswith("hub:"):
            found.append((_hub_file(source.path, directory / "hub"), source))
        else:
            found += [(file, source) for file in files.expand(source.path)]
    if not any(source.split == "train" for _, source in found):
        raise ConfigError(
            "data.train is empty. It takes files, directories, globs, hub:org/name/split, tfds:name/split or "
            "wheel:NAME==VERSION/path. Set config.data.train."
        )
    return found


def _hub_file(source: str, directory: Path) -> SourceFile:
    """A Hub dataset as a local file, fetched once: a resumed run must see the same rows, and may be offline."""
    directory.mkdir(exist_ok=True)
    path = _hub_path(source, directory)
    if not path.exists():
        source = pinned(source)
        path = _hub_path(source, directory)
    if not path.exists():
        with Workers(1) as workers:
            workers.submit(files.fetch_hub, source, path).result()
    return SourceFile(path, source)


def _hub_path(source: str, directory: Path) -> Path:
    return directory / (source.removeprefix("hub:").replace("/", "--") + ".jsonl")


def _key(data: DataConfig, tokenizer: TokenizerInfo, vocab_size: int, sources: list[Source], digests: list[str]) -> str:
    fields = settings(data)
    # The files' paths, the numbers of processes and the limit on rejected rows do not change the content.
    for name in ("train", "eval", "max_rejected", "num_workers", "num_loaders", "index_store"):
        del fields[name]
    # The tokenizer's digest covers these two.
    del fields["chat_template"], fields["eos_token"]
    # The scale: grouping files into sources matters only for scores with their own rule.
    read = [(digest, s.split, dict(s.own), s.scale) for digest, s in zip(digests, sources, strict=True)]
    key = [FORMAT, fields, tokenizer.sha256, vocab_size, read]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
