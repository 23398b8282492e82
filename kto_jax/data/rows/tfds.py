"""Sets of TensorFlow Datasets, read without TensorFlow: as ArrayRecord or Parquet, through `as_data_source`.

A set becomes a JSONL file in the cache once, in a worker process, and is then read as any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.config.packages import require
from kto_jax.data.workers import Workers
from kto_jax.storage.atomic import new_file
from kto_jax.storage.folders import cache_directory


def tfds_file(source: str) -> Path:
    """The set as a local file, fetched once: a resumed run must see the same rows, and may be offline.

    Args:
      source: `tfds:name/split`, where the name may have a config and a version (`name/config:1.0.0`); or
        `tfds-dir:path` or `tfds-dir:path:split`, a prepared version's own directory and "train" or another split.

    Returns:
      A JSONL file in the cache. A directory that has changed is read again.

    Raises:
      ConfigError: the source is misspelt, is not there, or cannot be read without TensorFlow; or tensorflow-datasets
        is not installed.
    """
    name, split = _parse(source)
    require("tensorflow_datasets", f"data source {source!r}", "name a local file")
    version: list[Any] = [source, os.environ.get("TFDS_DATA_DIR")]
    if source.startswith("tfds-dir:"):
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        version = [str(Path(name).resolve()), split]
        version += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16]
    path = cache_directory() / "tfds" / f"{key}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with Workers(1) as workers:
            workers.submit(fetch_tfds, source, path).result()
    return path


def fetch_tfds(source: str, path: Path) -> None:
    """Writes a set into a JSONL file, atomically. Run in a worker.

    Args:
      source: as in `tfds_file`.
      path: the file to write.

    Raises:
      ConfigError: the set is not there, or cannot be read without TensorFlow.
    """
    name, split = _parse(source)
    try:
        import tensorflow_datasets as tfds

        if source.startswith("tfds-dir:"):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
        features = builder.info.features
        with new_file(path, shared=True) as partial, partial.open("w", encoding="utf-8") as file:
            for row in builder.as_data_source(split):
                file.write(json.dumps(_plain(row, features)) + "\n")
    except Exception as error:
        # The builder of a dataset is third-party code, and may raise any exception.
        raise ConfigError(
            f"data source {source!r} cannot be read: {type(error).__name__}: {str(error)[:300]}. It is written "
            "tfds:name/split or tfds-dir:path:split, and must be prepared as ArrayRecord, which is read without "
            'TensorFlow. Check the name, or prepare it with file_format="array_record".'
        ) from error


def _parse(source: str) -> tuple[str, str]:
    kind, _, rest = source.partition(":")
    name, separator, split = rest.rpartition("/" if kind == "tfds" else ":")
    if kind == "tfds-dir" and (not separator or "/" in split):
        name, split = rest, "train"
    if not name or not split:
        raise ConfigError(
            f"data source {source!r} is not a set of TensorFlow Datasets. It is written tfds:name/split or "
            "tfds-dir:path:split. Name the split."
        )
    return name, split


def _plain(value: Any, feature: Any) -> Any:
    """A value as in JSON; a dictionary of sequences becomes a sequence of dictionaries."""
    inner: Any = getattr(feature, "feature", None)
    if hasattr(inner, "keys") and isinstance(value, Mapping):
        length = len(next(iter(value.values()), ()))
        return [{key: _plain(value[key][i], inner[key]) for key in value} for i in range(length)]
    if isinstance(value, Mapping):
        has_keys = hasattr(feature, "keys")
        return {key: _plain(item, feature[key] if has_keys else None) for key, item in value.items()}
    if isinstance(value, bytes):
        # Bytes that are not UTF-8 become surrogates, for which the row is rejected.
        return value.decode("utf-8", "surrogateescape")
    if hasattr(value, "tolist"):
        value = value.tolist()
        return _plain(value, inner) if isinstance(value, list | bytes) else value
    return [_plain(item, inner) for item in value] if isinstance(value, list | tuple) else value
