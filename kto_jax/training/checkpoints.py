"""Checkpoints of a run: written by Orbax in the background, read back, marked as verified, and restored.

    checkpoints/<step>/state     step, policy, optimizer and objective state, bad-step count, and the reference if it is
                                 synced
    checkpoints/<step>/VERIFIED  the checkpoint was read back after it was written, and agreed with its digests
    checkpoints/reference        the frozen reference, which is also the base of low-rank adapters; written once
    checkpoints/<step>.damaged   a checkpoint that could not be restored; nothing reads it

    save -> write in the background -> read back, compare digests -> mark as verified -> remove older checkpoints

A checkpoint gets its final name only when it is complete. A killed run resumes from the newest one whose arrays agree
with their digests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from kto_jax.config import CheckpointConfig, ConfigError, TransientError
from kto_jax.config.errors import FAILED, PREEMPTED
from kto_jax.devices import processes
from kto_jax.models.model import Params
from kto_jax.progress import console
from kto_jax.storage.bucket import is_bucket
from kto_jax.storage.folders import free_bytes
from kto_jax.storage.run_place import checkpoints_folder
from kto_jax.training.checkpoint_reading import (
    StoredTree,
    best_step,
    combined,
    groups,
    is_unreachable,
    quiet_libraries,
    reason_of,
    shown,
)
from kto_jax.training.ending import note_failed_write
from kto_jax.training.leaf_digests import differing, digest_leaves, named_leaves
from kto_jax.training.state import TrainState

# Fields of TrainState that a checkpoint holds, unless they are empty.
_STATE_FIELDS = ("step", "policy", "opt_state", "objective_state", "num_bad_steps")
# Each replica of an array writes a part of it. Slicing a part compiles a program, so small arrays stay whole.
_MIN_PART_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written: its step, the arrays' shapes and shardings, and its record."""

    step: int
    layout: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder.
      config: how many checkpoints to keep, and whether a damaged one ends the run.
      metric: the held-out figure that decides which checkpoint is best.
      reference_is_synced: whether the reference is synced, and therefore part of every checkpoint.

    Attributes:
      failure: why the last save failed; empty if it succeeded. The loop then saves again after the next step.
    """

    def __init__(
        self, workdir: Path, config: CheckpointConfig, *, metric: str = "eval_loss", reference_is_synced: bool = False
    ) -> None:
        quiet_libraries()
        self._directory = checkpoints_folder(workdir)
        self._config = config
        self._metric = metric
        self._fields = (*_STATE_FIELDS, "reference") if reference_is_synced else _STATE_FIELDS
        self._reference = ""
        self._pending: _Pending | None = None
        self._writer: ocp.AsyncResponse[bool] | None = None
        self._last_given: tuple[int, Mapping[str, float] | None] = (0, None)
        self.failure = ""
        self._context = ocp.Context()
        self._context.array.saving.min_slice_bytes_for_replica_parallel = _MIN_PART_BYTES
        # Compression makes a save a quarter longer on CPU, and shrinks float32 weights by 8 %.
        self._context.array.saving.use_compression = False
        self._checkpointer = self._open()
        self._held = list(map(str, self._steps))

    def _open(self) -> ocp.training.Checkpointer:
        """Orbax's view of the folder; removes what killed or failed saves left."""
        try:
            return ocp.training.Checkpointer(self._directory, context=self._context, cleanup_tmp_directories=True)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            if is_unreachable(self._directory, error):
                raise TransientError(
                    f"{self._directory} cannot be reached ({reason_of(error)}). Start again later."
                ) from None
            raise ConfigError(
                f"{self._directory} cannot be used: {reason_of(error)}. It must be a folder of checkpoints that this "
                "process may write to. Repair it, or choose another --workdir."
            ) from None

    def _stored(self, step: int) -> StoredTree:
        return StoredTree(self._directory / str(step))

    @property
    def exit_code(self) -> int:
        """Of a run whose last save failed: a bucket may be back when the run is started again, a full disk is not."""
        return PREEMPTED if is_bucket(str(self._directory)) else FAILED

    @property
    def _steps(self) -> list[int]:
        return sorted(one.step for one in self._checkpointer.checkpoints)

    def agree_on_latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none; waits until every process has called this.

        Raises:
          TransientError: the processes see different ones, as on a shared file system with delays.
        """
        step = self._steps[-1] if self._steps else None
        seen = processes.exchange_text(str(step))
        if len(set(seen)) > 1:
            raise TransientError(
                f"the processes see different newest checkpoints in {self._directory}: steps {', '.join(seen)}. All "
                "must see the same. Put --workdir on a file system that they share, and start again later."
            )
        return step

    def _figures(self) -> dict[int, float]:
        """The held-out figure of each checkpoint that has one."""
        found = self._checkpointer.checkpoints
        return {one.step: one.metrics[self._metric] for one in found if self._metric in (one.metrics or {})}

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best figure, as the first process sees it; None if none has one."""
        found = self._figures()
        answer = processes.exchange_text(str(best_step(found, self._metric) if found else ""))[0]
        return int(answer) if answer else None

    # ------------------------------------------------------------------------------------------------ saving
    def _check_in_place(self) -> None:
        """Refuses to go on in a folder that holds nothing of what this process has read or written there.

        Raises:
          ConfigError: the folder has been removed, renamed or replaced.
        """
        # A bucket has no folders that are replaced, and every question takes time.
        if is_bucket(str(self._directory)) or not processes.is_first():
            return
        if self._held and not any((self._directory / name).is_dir() for name in self._held):
            raise ConfigError(
                f"{self._directory} was removed, renamed or replaced while the run was writing to it: it held "
                f"{', '.join(self._held)}. A resumed run needs them. Put the folder back and run the same command "
                "again, or start in another --workdir."
            )

    def save(self, step: int, state: TrainState, figures: Mapping[str, float] | None) -> None:
        """Starts writing a checkpoint; returns when the state's buffers may be donated.

        A save that cannot start, or whose predecessor failed, sets `failure`; it leaves older checkpoints as they are.

        Args:
          step: steps taken.
          state: what to save.
          figures: held-out figures at this step, if they were measured; the checkpoint with the best one is kept. A
            non-finite figure counts as not measured, because NaN is not ordered.

        Raises:
          ConfigError: the folder has been removed, renamed or replaced.
        """
        self._finish()
        self._check_in_place()
        self._last_given = step, figures
        if step in self._steps:
            return
        held_out = {
            name: value for name, value in (figures or {}).items() if name.startswith("eval_") and math.isfinite(value)
        }
        if not self._reference and (reason := self._try_on_all(lambda: self.save_reference(state.reference))):
            self._report_failure(step, reason)
            return
        saved = self._saved_fields(state)
        if reason := self._lack_of_space(saved):
            self._report_failure(step, reason)
            return
        record = {"step": step, "digests": digest_leaves(saved), "reference": self._reference}
        layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
        metrics = held_out | {"step": step} if self._metric in held_out else None
        if reason := self._try_on_all(lambda: self._start_writing(step, saved, metrics, record)):
            self._recover(step, reason)
            return
        self._pending = _Pending(step, layout, record)
        if jax.default_backend() == "cpu":
            # On CPU the writer reads the state's buffers: a concurrent step would need a second copy of them.
            self._finish()

    def save_again(self, state: TrainState) -> None:
        """Saves the state that the last `save` was given, which failed, with the same figures."""
        step, figures = self._last_given
        self.save(step, state, figures)

    def poll(self) -> None:
        """Verifies the last save if it has been written by now; every process must call this at the same steps.

        Raises:
          ConfigError: the folder has been removed, renamed or replaced.
        """
        self._check_in_place()
        if self._pending and processes.broadcast_int(int(not self._checkpointer.is_saving_in_progress())):
            self._finish()

    def wait(self) -> None:
        """Waits until the last save is on disk and verified; `failure` says if it is not."""
        self._finish()

    def close(self) -> None:
        """Waits for saves and releases the background writer's resources."""
        try:
            self._finish()
        finally:
            with contextlib.suppress(Exception):  # an error of the writer has been reported
                self._checkpointer.close()

    def _start_writing(self, step: int, saved: Any, metrics: Any, record: dict[str, Any]) -> None:
        self._writer = self._checkpointer.save_checkpointables_async(
            step, {"state": saved}, metrics=metrics, custom_metadata=record, force=True
        )

    def _end_writing(self) -> None:
        """Waits for the writer, and raises its error. Its thread and open files are released by this call alone."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.result()

    def _finish(self) -> None:
        """Waits for the pending save, reads it back, marks it as verified and removes older checkpoints."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if reason := self._try_on_all(self._end_writing):
            self._recover(pending.step, reason)
            return
        try:
            self._read_back(pending)
        except ConfigError as error:
            self._set_aside(pending.step)
            self._report_failure(pending.step, f"it was read back after writing: {error}")
            return
        if processes.is_first():
            self._stored(pending.step).mark_verified(pending.record)
        self._remove_old()
        if self.failure:
            console.print(f"the checkpoint of step {pending.step} is saved; the one before had failed")
        self.failure = ""

    def _read_back(self, pending: _Pending) -> None:
        """Reads the written arrays group by group, and compares their digests with those of the saved state.

        Raises:
          ConfigError: naming the arrays that cannot be read or differ.
        """
        stored, digests = self._stored(pending.step), pending.record["digests"]
        names, (leaves, structure) = list(named_leaves(pending.layout)), jax.tree.flatten(pending.layout)
        for group in groups(leaves):
            wanted = [leaf if number in group else ocp.PLACEHOLDER for number, leaf in enumerate(leaves)]
            found = jax.tree.leaves(stored.load(jax.tree.unflatten(structure, wanted)))
            if broken := differing(digests, digest_leaves({names[number]: found[number] for number in group})):
                raise ConfigError(f"{shown(broken)} in {stored.place} differ from what was saved")

    def _remove_old(self) -> None:
        """Keeps the newest checkpoints and the best; the newest of all has just been verified."""
        kept = set(self._steps[-self._config.keep :])
        if figures := self._figures():
            kept.add(best_step(figures, self._metric))
        self._held = [*(["reference"] if self._reference else []), *map(str, sorted(kept))]
        if old := [step for step in self._steps if step not in kept]:
            if processes.is_first():
                for step in old:
                    with contextlib.suppress(OSError):  # the next save tries again
                        (self._directory / str(step)).rmtree()
            self._reload()

    def _reload(self) -> None:
        processes.exchange_text("changed")
        self._checkpointer.reload()

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that it is neither restored nor in the way of a new one."""
        if processes.is_first():
            names = (f"{step}.damaged{'' if number == 1 else f'-{number}'}" for number in range(1, 1000))
            place = next(self._directory / name for name in names if not (self._directory / name).exists())
            (self._directory / str(step)).rename(place)
        self._reload()

    def _lack_of_space(self, saved: Any) -> str:
        """Why the state does not fit on the disk, as the first process sees it; empty if it does."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
        free = free_bytes(self._directory) if processes.is_first() else None
        lacks = free is not None and free < needed
        return processes.exchange_text(
            f"{self._directory} has {free:,} bytes free, and up to {needed:,} are needed" if lacks else ""
        )[0]

    def _try_on_all(self, write: Callable[[], object]) -> str:
        """Calls a function that writes on every process; returns why it failed on one, or "" if it did not.

        Raises:
          Exception: an error of the devices or of the processes' connection, not of writing.
        """
        reason = ""
        try:
            write()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            reason = reason_of(error)
            if processes.num_processes() > 1 and "barrier" in reason.lower():
                raise
        return next((text for text in processes.exchange_text(reason) if text), "")

    def _recover(self, step: int, reason: str) -> None:
        """After a failed write: a new writer, because Orbax's raises the same error again; removes what was written."""
        note_failed_write()
        for release in (self._end_writing, self._checkpointer.close):
            with contextlib.suppress(Exception):
                release()
        self._checkpointer = self._open()
        free = free_bytes(self._directory)
        room = "" if free is None else f"; {free:,} bytes are free in {self._directory}"
        self._report_failure(step, reason + room)

    def _report_failure(self, step: int, reason: str) -> None:
        if not self.failure or reason.split()[0] != self.failure.split()[0]:
            console.print(
                f"error: the checkpoint of step {step} is not saved: {reason}. Older checkpoints are as they were. "
                "Free some space or repair the folder; the run tries again after every step.",
                style="red",
            )
        self.failure = reason

    # ------------------------------------------------------------------------------------------------ the reference
    def save_reference(self, reference: Params) -> None:
        """Writes the frozen reference once per run; does nothing if there is none or if it is synced."""
        if reference and "reference" not in self._fields:
            digests = digest_leaves(reference)
            with self._context:
                ocp.save(self._directory / "reference", reference, overwrite=True, custom_metadata={"digests": digests})
            self._reference = combined(digests)
            self._held.append("reference")

    def _saved_fields(self, state: TrainState) -> dict[str, Any]:
        parts = {name: getattr(state, name) for name in self._fields}
        return {name: part for name, part in parts.items() if jax.tree.leaves(part)}

    # ------------------------------------------------------------------------------------------------ restoring
    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Reads and checks the checkpoint of a step, with the shardings of `abstract`.

        Raises:
          ConfigError: the checkpoint is of another model or optimizer; lists the differences. Or it is damaged.
        """
        state = dataclasses.replace(abstract, **self._read_step(abstract, step), **self._read_reference(abstract))
        self._check_link(step)
        return state

    def restore_newest(self, abstract: TrainState) -> TrainState:
        """Reads the newest checkpoint that is whole; reports those that are not, and sets them aside.

        Raises:
          ConfigError: the reference is damaged, or no checkpoint is whole, or the newest is not and
            `checkpoint.strict` is set.
        """
        findings: dict[int, str] = {}
        for step in reversed(self._steps):
            try:
                self._check_link(step)
                moving = self._read_step(abstract, step)
            except ConfigError as error:
                findings[step] = str(error)
                if self._config.strict:
                    break
                continue
            state = dataclasses.replace(abstract, **moving, **self._read_reference(abstract))
            for number, finding in findings.items():
                console.print(f"{finding}; moved to {number}.damaged", style="yellow")
                self._set_aside(number)
            if findings:
                console.print(f"continuing from the checkpoint of step {step} instead", style="yellow")
            return state
        raise ConfigError(self._refusal(findings))

    def _refusal(self, findings: Mapping[int, str]) -> str:
        first, *others = findings.values()
        if " is a checkpoint of another model" in first:
            return first
        older = [step for step in self._steps if step not in findings]
        what = (
            f"config.checkpoint.strict refuses to resume from an older one ({', '.join(map(str, older))}). Set it to "
            "False to do so"
            if older
            else f"{f'{len(others)} older ones are damaged too. ' if others else ''}The run needs a whole checkpoint. "
            "Copy one back, or start again in another --workdir"
        )
        return f"{first}. {what}."

    @property
    def _stored_reference(self) -> StoredTree:
        return StoredTree(self._directory / "reference", is_step=False)

    def _digest_of_reference(self) -> str:
        """One digest of the frozen reference, as it was recorded; empty if there is none."""
        with contextlib.suppress(ConfigError):  # reading the reference reports it
            return combined(self._stored_reference.record().get("digests", {}))
        return ""

    def _read_reference(self, abstract: TrainState) -> dict[str, Any]:
        """The frozen reference by its field's name; {} if the run has none, or if it is part of every checkpoint."""
        if not abstract.reference or "reference" in self._fields:
            return {}
        stored = self._stored_reference
        try:
            reference, record = stored.read(abstract.reference)
        except ConfigError as error:
            remedy = ". The reference must not change. Copy the folder back, or start again in another --workdir."
            raise ConfigError(f"{error}{remedy if ' is damaged: ' in str(error) else ''}") from None
        self._say_if_unchecked(record, stored)
        self._reference = combined(record.get("digests", {}))
        return {"reference": reference}

    def _read_step(self, abstract: TrainState, step: int) -> dict[str, Any]:
        stored = self._stored(step)
        found, record = stored.read(self._saved_fields(abstract))
        self._say_if_unchecked(record, stored)
        return dict(found)

    def _check_link(self, step: int) -> None:
        """Refuses the checkpoint of a run with another frozen reference.

        Raises:
          ConfigError: with both digests.
        """
        stored = self._stored(step)
        recorded, own = stored.record().get("reference"), self._digest_of_reference()
        if recorded and own and recorded != own:
            raise ConfigError(f"{stored.place} belongs to reference {recorded}, and checkpoints/reference is {own}")

    def _say_if_unchecked(self, record: Mapping[str, Any], stored: StoredTree) -> None:
        if not record:
            console.print(f"{stored.place} was written without digests, so its values are not checked for damage")
