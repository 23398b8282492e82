"""Where the folder of a run is: on a disk, or in a bucket with a working copy on this host.

A run in a bucket (`--workdir=gs://BUCKET/RUN`) reads and writes a working copy in scratch space, so all other code sees
a local folder. Every process pulls the copy at the start. The first process pushes what has changed before every
checkpoint, every `PUSH_SECONDS` and at the end. `fetch_folder` makes a copy to read, of a run or a model, in the cache.

Orbax reads and writes checkpoints in a bucket of Google Cloud Storage itself (`checkpoints_folder`). It has no driver
for S3, where checkpoints are part of the working copy, and only one process can train.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from etils import epath

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage.bucket import Bucket, comes_from_a_bucket, describe, is_bucket
from kto_jax.storage.bucket_copies import ORIGIN, copy_files, download, local_files
from kto_jax.storage.bucket_watch import CHECK_SECONDS, BucketWatch
from kto_jax.storage.folders import scratch_folder
from kto_jax.storage.lease import LEASES, RENEW_SECONDS, Lease, acquire
from kto_jax.storage.repeated import repeated

PUSH_SECONDS = 30.0
"""Between pushes of what has changed, while a run trains."""
_CHECKPOINTS = "checkpoints/"
_RESULTS = ("policy/", "adapter/", "exports/", "profile/")
"""What a run writes and never reads."""
_LAST_OF_CHECKPOINT = "_CHECKPOINT_METADATA"
"""The file of a checkpoint that is written last and removed first; a checkpoint without it is incomplete."""


class RunPlace:
    """The folder of a run on a disk that all its processes share.

    Attributes:
      path: the local folder to read and write.
      name: of the folder, for people: its path or URL.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name = path, name or str(path)

    def pull(self) -> None:
        """Makes what the first process has written visible here."""

    def push(self) -> None:
        """Makes what this process has written visible to all, and lasting."""


@contextlib.contextmanager
def open_place(
    workdir: str, *, writes: bool, shared: bool = False, is_stopping: Callable[[], bool] = lambda: False
) -> Iterator[RunPlace]:
    """Opens the folder of a run; in a bucket, with the lease on it and a working copy.

    Args:
      workdir: a local path, or the URL of a folder in a bucket.
      writes: whether this process writes to it, as the first of a run does.
      shared: whether the run has other processes.
      is_stopping: whether a signal has asked this process to stop; it then waits no longer than 20 s for a bucket that
        does not answer.

    Raises:
      ConfigError: the bucket cannot be used.
      TransientError: another process uses the folder, or the bucket does not answer. An error of the body that the
        bucket has caused becomes one.
    """
    if not is_bucket(workdir):
        yield RunPlace(Path(workdir))
        return
    if shared and not _orbax_reaches(workdir):
        raise ConfigError(
            f"--workdir={workdir} cannot hold the checkpoints of several processes: Orbax writes their parts to shared "
            "disks and to gs:// alone. Choose such a --workdir, or train with one process."
        )
    bucket = Bucket(workdir, hurry=is_stopping)
    with scratch_folder() as scratch, contextlib.ExitStack() as stack:
        path = scratch / bucket.url.rpartition("/")[2]
        stack.enter_context(_reported_with_url(path, bucket.url))
        lease = acquire(bucket) if writes else None
        copy = WorkingCopy(path, bucket, lease)
        if lease:
            watch = BucketWatch(bucket.url, lease.renew, is_stopping, functools.partial(_end, scratch))
            stack.enter_context(_repeated(CHECK_SECONDS, watch.check))
            stack.callback(lease.release)
            stack.enter_context(_repeated(RENEW_SECONDS, watch.ask))
        copy.pull()
        if lease:
            stack.push(copy.push_last)
            stack.enter_context(_repeated(PUSH_SECONDS, copy.push_meanwhile))
        yield copy


def _repeated(seconds: float, action: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    def report(error: Exception) -> None:
        print(f"warning: {error} Training goes on meanwhile.", file=sys.stderr, flush=True)

    return repeated(seconds, action, name="working copy", failed=report)


def _end(scratch: Path, exit_code: int) -> None:
    """Ends the process whatever its threads do, and leaves no working copy behind."""
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(exit_code)


class WorkingCopy(RunPlace):
    """The folder of a run in a bucket.

    Args:
      path: of the copy, which must not exist.
      bucket: the run's folder.
      lease: on the folder; None on the processes that only read.
    """

    def __init__(self, path: Path, bucket: Bucket, lease: Lease | None) -> None:
        super().__init__(path, bucket.url)
        self._bucket, self._lease = bucket, lease
        self._written: dict[str, tuple[int, int]] = {}
        self._pushing = threading.Lock()

    def pull(self) -> None:
        """See `RunPlace`. Results are not copied, nor checkpoints that Orbax reaches; their folders are made."""
        found = self._bucket.versions()
        versions = _without_parts(self.name, found)
        if self._lease:
            for name in found.keys() - versions.keys():
                self._bucket.remove(name)
        never_read = (_CHECKPOINTS, *_RESULTS) if _orbax_reaches(self.name) else _RESULTS
        left_out = {name.split("/")[0] for name in versions if name.startswith(never_read)}
        not_copied = (LEASES, *(f"{folder}/" for folder in left_out))
        wanted = {name: version for name, version in versions.items() if not name.startswith(not_copied)}
        self.path.mkdir(parents=True, exist_ok=True)
        download(self._bucket, wanted, self.path)
        for folder in left_out:
            (self.path / folder).mkdir(exist_ok=True)
        self._written = {name: found for name, found in local_files(self.path).items() if name in wanted}

    def push(self) -> None:
        """See `RunPlace`. A config.json is written after all that it describes, and checkpoints after all else.

        Raises:
          TransientError: another process has taken the folder over, or the bucket does not answer.
        """
        self._push(self._bucket)

    def push_meanwhile(self) -> None:
        """Pushes while the run trains; what fails is tried again with the next push."""
        self._push(Bucket(self.name, patience=0))

    def push_last(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Pushes what an ended run has left; reports a failure without hiding the error that ended the run.

        A bucket that has just been waited for in vain is not waited for again.
        """
        try:
            if error is None or not self._bucket.is_away:
                self.push()
            else:
                raise TransientError("it does not answer.")
        except (ConfigError, TransientError) as failure:
            if error is None:
                raise
            print(f"warning: what was written last is not in the bucket: {failure}", file=sys.stderr)

    def _push(self, bucket: Bucket) -> None:
        if self._lease is None:
            return
        self._lease.check()
        with self._pushing:
            found = local_files(self.path)
            changed = [name for name in found if self._written.get(name) != found[name]]
            for name in sorted(changed, key=_turn):
                with contextlib.suppress(FileNotFoundError):  # removed or replaced meanwhile
                    bucket.upload(self.path / name, name)
                    self._written[name] = found[name]
            for name in sorted(self._written.keys() - found.keys(), key=_turn, reverse=True):
                bucket.remove(name)
                del self._written[name]


def fetch_folder(url: str, *, checkpoints: bool = False) -> Path:
    """A copy of a folder in a bucket, in the cache: of a run, or of a model.

    Files that have not changed since an earlier copy are not read again.

    Args:
      url: of the folder.
      checkpoints: whether the run's checkpoints will be read; they are copied if Orbax cannot read them in the bucket.

    Raises:
      ConfigError: there is no such folder.
      TransientError: the bucket does not answer.
    """
    bucket = Bucket(url)
    above, _, last = bucket.url.rpartition("/")
    if last in ("policy", "adapter") and above.count("/") > 2 and Bucket(above).read("manifest.json"):
        return fetch_folder(above) / last  # The run says how the model was trained.
    found = _without_parts(url, bucket.versions())
    copies_checkpoints = (checkpoints or "policy/config.json" not in found) and not _orbax_reaches(url)
    left_out = (LEASES, "exports/", "profile/", *(() if copies_checkpoints else (_CHECKPOINTS,)))
    versions = {name: version for name, version in found.items() if not name.startswith(left_out)}
    if not versions:
        raise ConfigError(f"{url} holds no files. It must be the folder of a run or of a model. Correct the URL.")
    folder = copy_files(bucket, versions, bucket.url)
    if any(name.startswith(_CHECKPOINTS) for name in found):
        (folder / _CHECKPOINTS).mkdir(exist_ok=True)
    return folder


def fetched(path: str, *, checkpoints: bool = False) -> str:
    """The path itself, or that of the copy of a folder in a bucket; see `fetch_folder`."""
    return str(fetch_folder(path, checkpoints=checkpoints)) if is_bucket(path) else path


def checkpoints_folder(run: Path) -> epath.Path:
    """The folder of a run's checkpoints: inside the run's, or in the bucket that `run` is a copy of."""
    origin = run / ORIGIN
    if origin.exists():
        url = json.loads(origin.read_text(encoding="utf-8"))["url"]
        if _orbax_reaches(url):
            return epath.Path(url) / "checkpoints"
    return epath.Path(run.absolute()) / "checkpoints"


def _orbax_reaches(url: str) -> bool:
    return url.startswith("gs://")


def _without_parts(url: str, versions: dict[str, str]) -> dict[str, str]:
    """The files of a run without those of checkpoints that a killed process has copied in part; Orbax copies none."""
    if _orbax_reaches(url):
        return versions

    def is_whole(name: str) -> bool:
        folders = name.split("/")[:-1]
        is_part = name.startswith(_CHECKPOINTS) and len(folders) > 1
        return not is_part or f"{_CHECKPOINTS}{folders[1]}/{_LAST_OF_CHECKPOINT}" in versions

    return {name: version for name, version in versions.items() if is_whole(name)}


def _turn(name: str) -> tuple[bool | str, ...]:
    """Sorts files in the order in which they are written; they are removed in the opposite one."""
    return (
        name.startswith(_CHECKPOINTS),
        name.endswith(_LAST_OF_CHECKPOINT),
        name == "config.json",
        name.endswith("/config.json"),
        name,
    )


@contextlib.contextmanager
def _reported_with_url(path: Path, url: str) -> Iterator[None]:
    """Puts the URL in place of the copy's path in errors, and turns failures of the bucket into TransientErrors."""
    try:
        yield
    except (ConfigError, TransientError) as error:
        if str(path) in str(error):
            raise type(error)(str(error).replace(str(path), url)) from error
        raise
    except Exception as error:
        if not comes_from_a_bucket(error):
            raise
        raise TransientError(
            f"{url} failed: {describe(error)}. The bucket must answer. Run the same command again when it does."
        ) from error
