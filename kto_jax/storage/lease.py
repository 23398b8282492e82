"""The lock of a folder in a bucket: a lease, which its holder renews and which ends when the holder is dead.

    .lease/000001.json, .lease/000002.json, …    the last one is valid

Each holder creates the next number, which a bucket lets one process do, and rewrites its own file every
`RENEW_SECONDS`. A lease that has not changed for `EXPIRY_SECONDS`, while another process watches it, has no holder;
clocks of hosts are never compared. A process that finds a higher number than its own has lost the folder.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage.bucket import Bucket

LEASES = ".lease/"
"""The folder of the leases."""
RENEW_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
_POLL_SECONDS = 1.0


class Lease:
    """The right of this process to write to a folder of a bucket; see `acquire`."""

    def __init__(self, bucket: Bucket, number: int, terms: dict[str, Any]) -> None:
        self._bucket, self._number, self._terms = bucket, number, terms
        self._is_lost = False

    def renew(self) -> None:
        """Says that the holder is alive; must be called every `RENEW_SECONDS`."""
        last = max(_numbers(self._bucket), default=0)
        if last > self._number:
            self._is_lost = True
        if not self._is_lost:
            self._write(renewals=self._terms["renewals"] + 1)

    def check(self) -> None:
        """Refuses to go on without the lease.

        Raises:
          TransientError: another process took it, because this one did not renew it in time.
        """
        if self._is_lost:
            raise TransientError(
                f"{self._bucket.url} was taken over by another process, because this one could not renew its lease "
                f"for {EXPIRY_SECONDS:g} s. One run may write to a folder. If the other one should not, stop it and "
                "run the same command again."
            )

    def release(self) -> None:
        """Gives the folder back, unless it was lost."""
        if self._is_lost:
            return
        try:
            if self._bucket.is_away:
                raise TransientError(f"{self._bucket.url} does not answer")
            self._write(is_released=True)
        except (ConfigError, TransientError) as error:
            print(f"warning: the lease is not released and lasts {EXPIRY_SECONDS:g} s more: {error}", file=sys.stderr)

    def _write(self, **changes: Any) -> None:
        self._terms |= changes
        self._bucket.write(_name(self._number), _encode(self._terms))


def acquire(bucket: Bucket) -> Lease:
    """Takes the lease of a folder, and waits for that of a dead holder to expire.

    Raises:
      TransientError: another process holds and renews it.
    """
    while True:
        last = max(_numbers(bucket), default=0)
        if last:
            _wait_for_end(bucket, last)
        terms = _own_terms()
        if bucket.create(_name(last + 1), _encode(terms)):
            for number in _numbers(bucket):
                if number <= last:
                    bucket.remove(_name(number))
            return Lease(Bucket(bucket.url, patience=0), last + 1, terms)  # A renewal that fails is not repeated.


def _wait_for_end(bucket: Bucket, number: int) -> None:
    """Returns once the lease is released or expired, or its holder is dead."""
    first = bucket.read(_name(number))
    terms = _decode(first)
    if _has_ended(terms):
        return
    holder = f"process {terms.get('pid', '?')} on {terms.get('host', '?')}, which began at {terms.get('since', '?')}"
    print(
        f"{bucket.url} was last used by {holder}; waiting up to {EXPIRY_SECONDS:g} s for a sign of it",
        file=sys.stderr,
    )
    deadline = time.monotonic() + EXPIRY_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        seen = bucket.read(_name(number))
        if seen is None or _has_ended(_decode(seen)):
            return
        if seen != first:
            raise TransientError(
                f"{bucket.url} is in use by {holder}. One run may write to a folder. Wait for it to end, or choose "
                "another --workdir."
            )
    print(f"{bucket.url}: no sign of {holder}, for {EXPIRY_SECONDS:g} s; taking it over", file=sys.stderr)


def _has_ended(terms: dict[str, Any]) -> bool:
    """Whether the holder has released the lease, or was a process of this machine that is gone."""
    if terms.get("is_released"):
        return True
    pid = terms.get("pid")
    if terms.get("machine") != _machine() or not isinstance(pid, int):
        return False
    return _start_of(pid) != terms.get("process")


def _own_terms() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": _machine(),
        "process": _start_of(os.getpid()),
        "token": secrets.token_hex(8),
        "renewals": 0,
        "is_released": False,
    }


def _machine() -> str:
    """Identifies what process ids are unique in: this boot of the machine, and the container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return secrets.token_hex(8)


def _start_of(pid: int) -> str:
    """When a process of this machine started, in clock ticks since the boot; "" if there is none."""
    with contextlib.suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
        return "" if state == "Z" else rest[18]
    return ""


def _numbers(bucket: Bucket) -> list[int]:
    names = [name.removeprefix(LEASES).removesuffix(".json") for name in bucket.versions(LEASES)]
    return [int(name) for name in names if name.isdecimal()]


def _name(number: int) -> str:
    return f"{LEASES}{number:06d}.json"


def _encode(terms: dict[str, Any]) -> bytes:
    return json.dumps(terms, indent=1).encode()


def _decode(content: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(content or b"{}")
        return found if isinstance(found, dict) else {}
    return {}
