"""Reads arrays that Orbax wrote, with the checks that Orbax lacks and errors of one line.

A folder holds the state of a step or the frozen reference. What was recorded when it was saved lies in its metadata:

    digests      path of each array -> digest, see `leaf_digests`
    step         steps taken; another number in the folder's name shows that the folder was renamed or copied here
    reference    digest of the frozen reference that the state belongs to; empty if there is none

Folders that older versions wrote hold no record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from kto_jax.config import ConfigError, TransientError
from kto_jax.devices import processes
from kto_jax.models.finite import find_nonfinite
from kto_jax.storage.bucket import comes_from_a_bucket, is_bucket
from kto_jax.training.leaf_digests import differing, digest_leaves, named_leaves

VERIFIED = "VERIFIED"
"""File in a step's folder: it was read back and agreed. It repeats the digests."""
GROUP_BYTES = 2**30
"""Arrays are read back in groups of this size, or one by one if they are larger: they lie beside the training state."""
_MOST_CHARACTERS = 200


def quiet_libraries() -> None:
    """Silences Orbax, which narrates every save, and asyncio, which prints a traceback for each array it cannot read.

    Their errors are raised as well, and reported in one line. After the first array that cannot be read, Orbax closes
    its event loop, to which TensorStore still answers for the others, and leaves its reads of them unfinished, which
    fail when Python frees them; Python would print each of these.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _WithoutLateAnswers):
        sys.unraisablehook = _WithoutLateAnswers(sys.unraisablehook)


@dataclasses.dataclass(frozen=True)
class _WithoutLateAnswers:
    """Passes on errors that Python cannot raise, except those of reads that nobody waits for any more."""

    others: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        is_freed = any(isinstance(one, GeneratorExit) for one in _causes(error))
        if not is_freed and "Event loop is closed" not in str(error):
            self.others(unraisable)


def is_unreachable(place: epath.Path, error: BaseException) -> bool:
    """Whether an error, or one that caused it, is that of a bucket that may answer later."""
    return is_bucket(str(place)) and any(comes_from_a_bucket(one) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one that caused it, and so on."""
    cause = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def reason_of(error: BaseException) -> str:
    """The first line of the error that caused this one, without TensorStore's description of the file's format."""
    *_, error = _causes(error)
    text = (str(error).splitlines() or [""])[0].split(" [tensorstore_spec")[0].split(" [source locations")[0]
    return f"{type(error).__name__}: {text[:_MOST_CHARACTERS]}"


def shown(paths: list[str]) -> str:
    """The first of some paths, and how many more there are."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def best_step(figures: Mapping[int, float], metric: str) -> int:
    """The step with the best figure, the first of equal ones: the lowest loss, or the highest of another metric."""
    sign = 1 if metric == "eval_loss" else -1
    return min(figures, key=lambda step: (sign * figures[step], step))


def combined(digests: Mapping[str, str]) -> str:
    """One digest of the digests of all arrays; empty if there are none."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()[:16] if digests else ""


@dataclasses.dataclass(frozen=True)
class StoredTree:
    """A tree of arrays in a folder.

    Attributes:
      place: the folder.
      is_step: whether it holds the state of a step, and not the reference.
    """

    place: epath.Path
    is_step: bool = True

    def describe(self) -> Any:
        """Shapes and dtypes of all arrays.

        Raises:
          ConfigError: the folder cannot be read.
          TransientError: it cannot be reached for now.
        """
        with self._one_line():
            if self.is_step:
                return ocp.checkpointables_metadata(self.place).metadata["state"]
            return ocp.metadata(self.place).metadata

    def describe_recorded(self, record: Mapping[str, Any]) -> Any:
        """Shapes and dtypes of all arrays, which must be those that were recorded, if anything was.

        Raises:
          ConfigError: the folder cannot be read, or its description is damaged.
          TransientError: it cannot be reached for now.
        """
        described = self.describe()
        if not described or (record and named_leaves(described).keys() != record["digests"].keys()):
            raise self._damage("the description of its arrays is missing or cannot be read")
        return described

    def record(self) -> dict[str, Any]:
        """What was recorded when the folder was written; {} if a version without digests wrote it.

        Raises:
          ConfigError: the record is missing from a folder that must have one, or was made for another folder.
          TransientError: the folder cannot be reached for now.
        """
        with self._one_line():
            metadata = (ocp.checkpointables_metadata if self.is_step else ocp.metadata)(self.place)
            found = metadata.custom_metadata or self._mark()
        if not found and metadata.commit_timestamp_nsecs is None:
            raise self._damage("its _CHECKPOINT_METADATA is missing or cannot be read")
        if found and not isinstance(found.get("digests"), dict):
            raise self._damage("its record holds no digests")
        if found and self.is_step and str(found.get("step")) != self.place.name:
            raise self._damage(f"it is the checkpoint of step {found.get('step')}, renamed or copied here")
        return dict(found or {})

    def is_verified(self) -> bool:
        """Whether the folder was read back after it was written."""
        return bool(self._mark())

    def mark_verified(self, record: Mapping[str, Any]) -> None:
        """Records that the folder was read back and agreed."""
        (self.place / VERIFIED).write_text(json.dumps(dict(record)) + "\n")

    def _mark(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.place / VERIFIED).read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def load(self, wanted: Any) -> Any:
        """Reads arrays into the shardings of `wanted`, whose placeholders are left out.

        Raises:
          ConfigError: arrays cannot be read; names them.
          TransientError: the folder cannot be reached for now.
        """
        try:
            with self._one_line():
                return self._load(wanted)
        except ConfigError:
            leaves, structure = jax.tree.flatten(wanted)
            names = list(named_leaves(wanted))
            if processes.num_processes() > 1 or len(leaves) == 1:
                raise
            for number, name in enumerate(names):
                if leaves[number] is not ocp.PLACEHOLDER:
                    alone = [leaf if i == number else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
                    with self._one_line(name):
                        self._load(jax.tree.unflatten(structure, alone))
            raise

    def _load(self, wanted: Any) -> Any:
        if self.is_step:
            return ocp.load_checkpointables(self.place, {"state": wanted})["state"]
        return ocp.load(self.place, wanted)

    def read(self, wanted: Any) -> tuple[Any, dict[str, Any]]:
        """Reads and checks a whole tree; every process must call this.

        Args:
          wanted: shapes, dtypes and shardings.

        Returns:
          The arrays, and what was recorded with them ({} if nothing was).

        Raises:
          ConfigError: it is of another model or optimizer, it cannot be read, an array differs from its digest, or
            holds a value that is not finite.
          TransientError: the folder cannot be reached for now.
        """
        found, record = processes.call_on_all(lambda: self._read(wanted))
        self.compare(record, found)
        # Steps with values that are not finite are not applied, so a run never saves any.
        broken = processes.call_on_all(lambda: find_nonfinite(found))
        if broken:
            names = shown([name.replace(".", "/") for name in broken])
            raise self._damage(f"values are NaN or infinite in {names}")
        return found, record

    def compare(self, record: Mapping[str, Any], found: Any) -> None:
        """Compares arrays with the recorded digests, if there are any; every process must call this.

        Raises:
          ConfigError: naming the arrays that differ.
        """
        if record and (broken := differing(record["digests"], digest_leaves(found))):
            raise self._damage(f"the digest of {shown(broken)} is not the one recorded when it was saved")

    def _read(self, wanted: Any) -> tuple[Any, dict[str, Any]]:
        record = self.record()
        described = self.describe_recorded(record)
        check_arrays(described, wanted, self.place)
        return self.load(wanted), record

    def _damage(self, what: str) -> ConfigError:
        return ConfigError(f"{self.place} is damaged: {what}")

    @contextlib.contextmanager
    def _one_line(self, name: str = "") -> Iterator[None]:
        """Turns the errors of Orbax and TensorStore into one line each."""
        try:
            yield
        except (ConfigError, TransientError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            reason = reason_of(error)
            if is_unreachable(self.place, error):
                raise TransientError(f"{self.place} cannot be reached ({reason}). Start again later.") from None
            raise self._damage(f"{name or 'it'} cannot be read ({reason})") from None


def _shapes_and_dtypes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of every array of a tree; elements of tuples and named tuples are named by position."""
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in named_leaves(tree).items()}


def check_arrays(found: Any, wanted: Any, place: epath.Path) -> None:
    """Refuses a checkpoint whose arrays do not match the model's.

    Raises:
      ConfigError: listing missing, unexpected and differing arrays.
    """
    has, wants = _shapes_and_dtypes(found), _shapes_and_dtypes(wanted)
    problems = [f"{path}: missing" for path in sorted(wants.keys() - has.keys())]
    problems += [f"{path}: unexpected" for path in sorted(has.keys() - wants.keys())]
    problems += [
        f"{path}: checkpoint has {has[path]}, model wants {wants[path]}"
        for path in sorted(has.keys() & wants.keys())
        if has[path] != wants[path]
    ]
    if problems:
        listed = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ConfigError(
            f"{place} is a checkpoint of another model or optimizer: {listed}. Resuming needs the same arrays. "
            "Restore the run's configuration, or choose another --workdir."
        )


def groups(leaves: Sequence[Any]) -> Iterator[list[int]]:
    """Positions of arrays, in groups of up to `GROUP_BYTES`."""
    group, size = list[int](), 0
    for number, leaf in enumerate(leaves):
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(number)
        size += nbytes
    if group:
        yield group
