"""A folder in a bucket, `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`: reads and writes that wait for a bucket.

The libraries below repeat what fails (429, 503, a lost connection) for about half a minute. What still fails is tried
again here, with a message and growing pauses, for `PATIENCE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kto_jax.config import ConfigError, TransientError

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""How long a bucket may fail before the run ends with exit code 75."""
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
"""Seconds between tries."""
_SLOW_SECONDS = 30.0
"""A read or write that takes longer than this is reported."""
_CONNECT_SECONDS, _ANSWER_SECONDS = 15, 60
"""A connection or an answer that takes longer counts as failed."""
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_NETWORK_PACKAGES = {"aiohttp", "requests", "urllib3", "botocore", "aiobotocore", "google", "gcsfs"}
_BUSY = (408, 429)
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_UNAVAILABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
"""Words in the errors of TensorStore, which reads and writes the arrays of checkpoints."""


def is_bucket(path: str) -> bool:
    """Whether a path names a bucket or a folder in one."""
    return path.split("://")[0] in _PACKAGES and "://" in path


class Bucket:
    """The files below one folder of a bucket; all methods may be called from several threads.

    Args:
      url: `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`.
      patience: seconds of failures after which a method gives up.
      hurry: whether this process was asked to stop; pauses then end early.
      is_whole: whether the URL names a bucket, `gs://BUCKET`, rather than a folder in one.

    Attributes:
      is_away: whether the last method that was called gave up.

    Raises:
      ConfigError: the URL is none, or its package is not installed. The methods raise it if the bucket does not exist
        or may not be used, and TransientError if it does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: float | None = None,
        hurry: Callable[[], bool] | None = None,
        is_whole: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        kind, _, self._root = self.url.partition("://")
        if kind not in _PACKAGES or not self._root or ("/" not in self._root and not is_whole):
            raise ConfigError(
                f"{url} is no folder in a bucket. Allowed: gs://BUCKET/FOLDER and s3://BUCKET/FOLDER. Correct it, or "
                "give a local folder."
            )
        self._patience, self._hurry = patience, hurry
        self.is_away = False
        self._files = _file_system(kind)

    def versions(self, below: str = "") -> dict[str, str]:
        """The names of all files and a text that changes with each file's content.

        Args:
          below: only files in this folder, a path that ends in "/".
        """
        root = f"{self._root}/{below}".rstrip("/")
        try:
            found = self._try("listed", lambda: self._files.find(root, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        return {
            name.removeprefix(f"{self._root}/"): _version(info)
            for name, info in found.items()
            if info.get("type") == "file" and name.startswith(f"{root}/") and not name.endswith("/")
        }

    def find(self, pattern: str) -> dict[str, str]:
        """The files whose names match a glob, as `versions`; a name without `*`, `?` and `[` matches itself."""
        found = self._try("listed", lambda: self._files.glob(f"{self._root}/{pattern}", detail=True))
        return {
            name.removeprefix(f"{self._root}/"): _version(info)
            for name, info in found.items()
            if info.get("type") == "file" and not name.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """The content of a file, None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._try(f"read ({name})", lambda: self._files.cat_file(f"{self._root}/{name}"))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; readers see the old content or the new."""
        self._write(name, lambda path: self._files.pipe_file(path, content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless there is one; of several processes that try, one succeeds.

        Returns:
          Whether the file is this one.
        """
        try:
            self._write(name, lambda path: self._files.pipe_file(path, content, mode="create"))
            return True
        except FileExistsError:
            return self.read(name) == content  # This process's own, if the answer to the first try was lost.

    def upload(self, path: Path, name: str) -> None:
        """Copies a local file to the bucket.

        Raises:
          FileNotFoundError: there is no such local file.
        """
        path.stat()
        self._write(name, lambda target: self._files.put_file(str(path), target))

    def download(self, name: str, path: Path) -> None:
        """Copies a file of the bucket to a local path, whose folder is created."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._try(f"read ({name})", lambda: self._files.get_file(f"{self._root}/{name}", str(path)))

    def remove(self, name: str) -> None:
        """Removes a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._try(f"written to ({name})", lambda: self._files.rm_file(f"{self._root}/{name}"))

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        try:
            self._try(f"written to ({name})", lambda: write(f"{self._root}/{name}"))
        except FileNotFoundError as error:
            raise self._refusal(f"written to ({name})", error) from error

    def _try(self, purpose: str, ask: Callable[[], T]) -> T:
        """The answer to a request, repeated while its failures may pass.

        Raises:
          FileNotFoundError, FileExistsError: as the bucket answers.
        """
        patience = PATIENCE_SECONDS if self._patience is None else self._patience
        started, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                with self._reported_if_slow(purpose):
                    answer = ask()
                self.is_away = False
                return answer
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:
                if not may_pass(error):
                    raise self._refusal(purpose, error) from error
                failed = time.monotonic() - started
                if failed + pause > patience:
                    self.is_away = True
                    raise TransientError(
                        f"{self.url} could not be {purpose} for {failed:.0f} s: {describe(error)}. The bucket must "
                        "answer. Run the same command again when it does."
                    ) from error
                _say(f"{self.url} cannot be {purpose}: {describe(error)}; trying again in {pause:.0f} s")
            self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _pause(self, seconds: float) -> None:
        if self._hurry is None:
            time.sleep(seconds)
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            if self._hurry():
                return

    @contextlib.contextmanager
    def _reported_if_slow(self, purpose: str) -> Iterator[None]:
        text = f"{self.url} is slow: it has not been {purpose} for {_SLOW_SECONDS:.0f} s; still waiting"
        timer = threading.Timer(_SLOW_SECONDS, _say, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _refusal(self, purpose: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self.url} cannot be {purpose}: {describe(error)}. It must be a folder of a bucket that exists and that "
            "this host may read and write. Check its name and the credentials of this host, or choose another folder."
        )


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later, as after a lost connection, a 429 or a 503."""
    if (
        isinstance(error, (FileNotFoundError, FileExistsError, PermissionError))
        or "Credentials" in type(error).__name__
    ):
        return False
    if isinstance(code := getattr(error, "code", None), int):
        return code in _BUSY or code >= 500
    if isinstance(error, OSError):
        return error.errno not in _OF_DISKS and not str(error).startswith("Forbidden")
    return comes_from_a_bucket(error)


def comes_from_a_bucket(error: BaseException) -> bool:
    """Whether a library that talks to buckets has raised this, because a bucket did not answer as it should."""
    if isinstance(error, ValueError):  # as TensorStore raises
        return any(word in str(error) for word in _UNAVAILABLE)
    is_of_network = type(error).__module__.split(".")[0] in _NETWORK_PACKAGES
    return is_of_network or isinstance(error, (ConnectionError, TimeoutError))


def describe(error: BaseException) -> str:
    """The kind of an error and its first line."""
    reason = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _version(info: dict[str, Any]) -> str:
    tag = info.get("etag") or info.get("ETag") or info.get("generation") or info.get("mtime")
    return f"{info.get('size')} {tag}"


@functools.cache
def _file_system(kind: str) -> Any:
    """The file system of a kind of bucket, with time limits.

    The limits become fsspec's defaults, so that they also hold for Orbax, which opens a file system of its own.
    """
    package = _PACKAGES[kind]
    try:
        importlib.import_module(package)
        import fsspec.config
    except ImportError as error:
        raise ConfigError(
            f"{kind}:// needs the package {package}, which cannot be imported: {error}. A local folder needs none. "
            f"Install it (pip install {package}), or give a local folder."
        ) from error
    logging.getLogger(package).setLevel(logging.CRITICAL)  # It logs tracebacks of errors that are reported here.
    if kind == "gs":
        import aiohttp

        # TensorStore has no limit by default, and would wait for ever for a server that does not answer.
        os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_ANSWER_SECONDS))
        os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS)
        fsspec.config.conf.setdefault("gcs", {}).setdefault("requests_timeout", limits)
    else:
        timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _ANSWER_SECONDS}
        fsspec.config.conf.setdefault("s3", {}).setdefault("config_kwargs", timeouts)
    return fsspec.filesystem(kind, use_listings_cache=False, skip_instance_cache=True)
