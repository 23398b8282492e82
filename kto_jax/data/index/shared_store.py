"""A store of finished indices in a folder or a bucket, for hosts without a shared disk and for later runs.

STORE/KEY/contents.json            names, sizes and digests of the files; written last, so it marks a complete index
STORE/KEY/tokens-DIGEST.bin, …     the files; names contain digests, so concurrent publishers do not conflict
STORE/KEY/building.json            heartbeat: changes every few seconds while a process builds or publishes the index
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage.atomic import new_file
from kto_jax.storage.digests import file_digest
from kto_jax.storage.repeated import repeated

FORMAT = 1
"""Version of contents.json."""
_CONTENTS, _SIGN = "contents.json", "building.json"
_PLAIN_NAME = re.compile(r"\w[\w.-]*")
_SIGN_SECONDS = 10.0
_POLL_SECONDS = 5.0
_SAY_SECONDS = 60.0
_PATIENCE_SECONDS = 600.0
"""Time without a heartbeat of the building process after which the waiting processes give up."""
_STALE_SECONDS = 86_400
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


class IndexStore:
    """A store of finished indices for all hosts.

    Args:
      url: a folder, or a URL that fsspec supports, such as `gs://bucket/folder` or `s3://bucket/folder`.

    Raises:
      ConfigError: the URL's scheme is unknown, or its package is not installed. The methods also raise it, if the store
        cannot be reached, read or written.
    """

    def __init__(self, url: str):
        self._url = url
        try:
            import fsspec.core

            self._files, root = fsspec.core.url_to_fs(str(Path(url).expanduser()) if "://" not in url else url)
        except ImportError as error:
            kind = url.split("://")[0]
            package = _PACKAGES.get(kind, "the one that fsspec names for it")
            raise ConfigError(
                f"config.data.index_store={url!r} needs the package {package}, which cannot be imported: {error}. A "
                f"folder needs none. Install it (pip install {_PACKAGES.get(kind, kind)}), or set a folder."
            ) from error
        except Exception as error:
            raise self._refusal("be used", error) from error
        self._root = root.rstrip("/")
        self._is_local = "file" in ([protocol] if isinstance(protocol := self._files.protocol, str) else protocol)

    def find(self, key: str) -> dict[str, Any] | None:
        """The contents.json of a published index, or None if there is no complete index.

        Raises:
          ConfigError: contents.json is of another version or another index.
        """
        text = self._read(key, _CONTENTS)
        if text is None:
            return None
        with contextlib.suppress(ValueError, TypeError, KeyError):
            contents = json.loads(text)
            names = [name for name, file in contents["files"].items() for name in (name, file["object"])]
            if contents["format"] == FORMAT and contents["key"] == key and all(map(_PLAIN_NAME.fullmatch, names)):
                return contents
        raise ConfigError(
            f"{self._url}/{key[:16]}/{_CONTENTS} is broken, or of another version than {FORMAT}. The process that "
            f"publishes an index writes it. Delete {self._url}/{key[:16]}: the next run builds and publishes it again."
        )

    def copy(self, key: str, contents: dict[str, Any], directory: Path) -> None:
        """Copies an index to this host, and checks every file's size and digest against the published ones.

        Args:
          key: of the index.
          contents: the result of `find`.
          directory: the target; replaced if it exists.

        Raises:
          ConfigError: a file is missing, or differs from the published one.
        """
        size = sum(file["bytes"] for file in contents["files"].values())
        print(f"copying the index from {self._url}/{key[:16]} ({size / 1e6:.1f} MB)", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name, file in contents["files"].items():
            with self._reachable("be read"):
                self._files.get_file(self._path(key, file["object"]), str(directory / name))
            found = (directory / name).stat().st_size, file_digest(directory / name)
            if found != (file["bytes"], file["sha256"]):
                raise ConfigError(
                    f"{self._url}/{key[:16]}/{file['object']} has {found[0]} bytes and sha256 {found[1]}; published "
                    f"were {file['bytes']} and {file['sha256']}. They must be equal. Delete {self._url}/{key[:16]}: "
                    "the next run builds and publishes the index again."
                )

    @contextlib.contextmanager
    def publishing(self, key: str, directory: Path) -> Iterator[None]:
        """Publishes the index that the body builds, with heartbeats meanwhile; does nothing if it is already published.

        Args:
          key: of the index.
          directory: path of the finished index when the body ends.
        """
        if self.find(key) is not None:
            yield
            return
        with self.signs_of_building(key):
            yield
            if self.find(key) is None:
                self.publish(key, directory)

    def publish(self, key: str, directory: Path) -> None:
        """Writes a finished index to the store; readers see all of it or nothing."""
        files = {}
        paths = sorted(path for path in directory.iterdir() if path.is_file())
        size = sum(path.stat().st_size for path in paths)
        print(f"publishing the index to {self._url}/{key[:16]} ({size / 1e6:.1f} MB)", file=sys.stderr)
        self._remove_stale(key)
        for path in paths:
            digest = file_digest(path)
            name = f"{path.stem}-{digest[:16]}{path.suffix}"
            files[path.name] = {"object": name, "bytes": path.stat().st_size, "sha256": digest}
            self._write(key, name, functools.partial(self._files.put_file, str(path)))
        contents = {"format": FORMAT, "key": key, "files": files}
        text = json.dumps(contents, indent=1).encode()
        self._write(key, _CONTENTS, lambda target: self._files.pipe_file(target, text))

    @contextlib.contextmanager
    def signs_of_building(self, key: str) -> Iterator[None]:
        """Writes heartbeats for the waiting processes as long as the body runs."""
        token, started = secrets.token_hex(4), time.monotonic()

        def sign() -> None:
            text = json.dumps({"process": token, "seconds": round(time.monotonic() - started, 1)}).encode()
            self._write(key, _SIGN, lambda target: self._files.pipe_file(target, text))

        def ignore(error: Exception) -> None:
            """One heartbeat may fail; the body reports errors."""

        sign()  # here, so that an unwritable store is reported before hours of building
        try:
            with repeated(_SIGN_SECONDS, sign, name="signs of building", failed=ignore):
                yield
        finally:
            with contextlib.suppress(Exception):
                self._files.rm_file(self._path(key, _SIGN))

    def wait(self, key: str, is_here: Callable[[], bool]) -> None:
        """Waits until another process has published an index.

        Args:
          key: of the index.
          is_here: whether the index is on this host by now, from any process.

        Raises:
          TransientError: there was no heartbeat for too long, for example because the building process was killed.
        """
        started = said = last_sign = time.monotonic()
        sign = None
        print(f"waiting for the first process, which builds the index, in {self._url}/{key[:16]}", file=sys.stderr)
        while not is_here() and self.find(key) is None:
            if (seen := self._read(key, _SIGN)) != sign:
                sign, last_sign = seen, time.monotonic()
            now = time.monotonic()
            if now - last_sign > _PATIENCE_SECONDS:
                raise TransientError(
                    f"for {now - last_sign:.0f} s there was no sign of a process that builds the index, in "
                    f"{self._url}/{key[:16]}. The first process of a run builds it, and all must see the same feedback "
                    "and the same config.data.index_store. See why the first process ended, and start all again."
                )
            if now - said > _SAY_SECONDS:
                said = now
                print(f"still waiting for the index, {now - started:.0f} s", file=sys.stderr)
            time.sleep(_POLL_SECONDS)

    def _path(self, key: str, name: str) -> str:
        return f"{self._root}/{key[:16]}/{name}"

    def _read(self, key: str, name: str) -> bytes | None:
        with self._reachable("be read"), contextlib.suppress(FileNotFoundError):
            return self._files.cat_file(self._path(key, name))
        return None

    def _write(self, key: str, name: str, write: Callable[[str], object]) -> None:
        """Writes a file atomically: buckets do so by themselves, folders need a rename."""
        path = self._path(key, name)
        with self._reachable("be written to"):
            if self._is_local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with new_file(path, shared=True) as partial:
                    write(os.fspath(partial))
            else:
                write(path)

    def _remove_stale(self, key: str) -> None:
        """Removes partial files of processes that were killed long ago; buckets have none."""
        if self._is_local:
            for path in Path(self._root, key[:16]).glob(".*.partial"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                        path.unlink()

    @contextlib.contextmanager
    def _reachable(self, purpose: str) -> Iterator[None]:
        """Converts the various file systems' exceptions to one ConfigError."""
        try:
            yield
        except Exception as error:
            raise self._refusal(purpose, error) from error

    def _refusal(self, purpose: str, error: Exception) -> ConfigError:
        reason = (str(error).splitlines() or [""])[0][:300]
        return ConfigError(
            f"config.data.index_store={self._url!r} cannot {purpose}: {type(error).__name__}: {reason}. It must be a "
            "folder or a bucket (gs://…, s3://…) that every host may read and write. Check its name, the network and "
            "the credentials of this host, or set another."
        )
