"""Copies of files in buckets on this host: the working copy of a run, and models and feedback in the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.storage.atomic import write_json
from kto_jax.storage.bucket import Bucket
from kto_jax.storage.folders import cache_folder
from kto_jax.storage.locks import lock_file

ORIGIN = ".bucket.json"
"""The file of a copy that says what it is a copy of: `{"url": ..., "files": {name: [version, bytes, time]}}`."""
_PRIVATE = (ORIGIN, ".lock")
_UNFINISHED = ".orbax-checkpoint-tmp"
"""Marks folders that Orbax is still writing."""


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The files that a URL names.

    Attributes:
      bucket: that holds them.
      versions: their names in the bucket, each with a text that changes with the file's content.
      folder: what the names of a folder's files begin with; None if the URL names a file or is a glob.
    """

    bucket: Bucket
    versions: Mapping[str, str]
    folder: str | None = None


def find_files(url: str) -> FoundFiles:
    """Looks up the files that a URL names, which may be none.

    Args:
      url: `gs://` or `s3://`, of a file, of a folder, whose files are found at any depth, or a glob.

    Raises:
      ConfigError: the bucket does not exist or may not be read, or its package is not installed.
      TransientError: the bucket does not answer.
    """
    kind, _, rest = url.partition("://")
    name, _, path = rest.partition("/")
    bucket, path = Bucket(f"{kind}://{name}", is_whole=True), path.rstrip("/")
    if path and (files := bucket.find(path)):
        return FoundFiles(bucket, files)
    folder = f"{path}/" if path else ""
    return FoundFiles(bucket, bucket.versions(folder), folder)


def copy_files(bucket: Bucket, versions: Mapping[str, str], source: str) -> Path:
    """Copies files of a bucket to the cache, except those that have not changed since an earlier call.

    Args:
      bucket: to copy from.
      versions: the files, as `Bucket.versions` names them.
      source: URL that names them all; each source has a folder of its own.

    Returns:
      The folder of the copies, which holds no other files.

    Raises:
      ConfigError: a file cannot be read or written.
      TransientError: the bucket does not answer.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = cache_folder("buckets", digest, source.rstrip("/").rpartition("/")[2])
    with (folder.parent / ".lock").open("a") as lock:
        lock_file(lock, wait=True, without="Copy one folder at a time.")
        known = _read_known(folder)
        new = sum(int(version.split()[0]) for name, version in versions.items() if known.get(name, [""])[0] != version)
        if new:
            print(f"copying {source} to {folder} ({new / 1e6:.1f} MB are new)", file=sys.stderr)
        download(bucket, versions, folder)
    return folder


def download(bucket: Bucket, versions: Mapping[str, str], folder: Path) -> None:
    """Makes a copy hold these files of a bucket, and records what it holds for the next call."""
    known, local = _read_known(folder), local_files(folder)
    files = {}
    for name, version in versions.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ConfigError(f"{bucket.url} holds a file named {name!r}, which leaves the folder. Remove it.")
        if known.get(name) != [version, *local.get(name, ())]:
            bucket.download(name, folder / name)
        found = (folder / name).stat()
        files[name] = [version, found.st_mtime_ns, found.st_size]
    for name in known.keys() - versions.keys():
        (folder / name).unlink(missing_ok=True)
    write_json(folder / ORIGIN, {"url": bucket.url, "files": files})


def _read_known(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return dict(json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["files"])
    return {}


def local_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (time, size) of all files but the private and the half-written."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_partial = any(part.startswith(".") and part.endswith((".partial", ".old")) for part in name.split("/"))
        if name not in _PRIVATE and not is_partial and _UNFINISHED not in name:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.is_file():
                    found[name] = status.st_mtime_ns, status.st_size
    return found
