"""The training loop: dispatches a step, logs the previous one, evaluates and saves when due.

    host      dispatch 1 | dispatch 2, log 1 | dispatch 3, log 2 | ... | dispatch n, log n - 1, log n, evaluate, save
    devices   [------ step 1 ------][------ step 2 ------][------ step 3 ------]

The host reads the metrics of a step only after it has dispatched the next one, so the devices do not wait for it.
Before it evaluates, saves or ends the run, it logs all steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kto_jax.config import Config, ProfileConfig
from kto_jax.config.errors import FAILED
from kto_jax.data.batches.prefetch import prefetch
from kto_jax.devices import processes
from kto_jax.devices.compilation import Program
from kto_jax.devices.sharding import local_rows, place_batch
from kto_jax.progress import console
from kto_jax.shapes import FeedbackBatch
from kto_jax.storage.run_place import RunPlace
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.in_flight import StepsInFlight
from kto_jax.training.inputs import Inputs
from kto_jax.training.logs import MetricsLog
from kto_jax.training.patience import Patience
from kto_jax.training.preemption import Preemption
from kto_jax.training.save_timer import SaveTimer
from kto_jax.training.state import TrainState
from kto_jax.training.trackers import open_trackers
from kto_jax.training.unusual import UnusualSteps
from kto_jax.training.watchdog import Watchdog

_TRIES, _RETRY_SECONDS = 5, 5.0
"""How often, and after how long, the last step is saved again if that failed; machines are taken away soon after they
say so."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of the loop.

    Attributes:
      config: the run.
      inputs: the run's inputs.
      mesh: the devices.
      take_step: the training step, (state, batch) -> (state, figures).
      evaluate: measures a state on the held-out feedback; None if nothing is held out.
      patience: says when to end early.
      peak: FLOP/s of all devices together.
      peak_is_measured: whether `peak` was measured, not published.
      saves: whether checkpoints are written before a signal asks for one.
    """

    config: Config
    inputs: Inputs
    mesh: Mesh
    take_step: Program
    evaluate: Callable[[TrainState], dict[str, float]] | None
    patience: Patience
    peak: float
    peak_is_measured: bool
    saves: bool = True


def take_steps(
    job: Job,
    place: RunPlace,
    checkpoints: Checkpoints,
    preemption: Preemption,
    state: TrainState,
) -> tuple[TrainState, int]:
    """Takes the remaining steps.

    Args:
      job: what to run.
      place: the run's folder; what is in it is pushed before a checkpoint is written.
      checkpoints: the run's checkpoints.
      preemption: checked after every step for a request to stop.
      state: the state to start from; its buffers are donated.

    Returns:
      The last state and an exit code: 0 if all steps were taken or the run ended early, 1 or 75 if the last save
      failed.
    """
    config, num_steps, first = job.config, job.inputs.num_steps, int(state.step)
    folder, writes = place.path, processes.is_first()
    if job.patience.is_exhausted:
        return state, 0
    with contextlib.ExitStack() as stack:
        trackers = open_trackers(config, folder, first) if writes else []
        log = stack.enter_context(MetricsLog(folder, first, num_steps, trackers=trackers, enabled=writes))
        in_flight = stack.enter_context(StepsInFlight(job.peak, peak_is_measured=job.peak_is_measured))
        profile = stack.enter_context(Profile(folder / "profile", config.profile))
        watchdog = stack.enter_context(Watchdog(config.watch, folder, first))
        batches: Any = _batches(job, range(first, num_steps))
        stack.callback(batches.close)
        stack.enter_context(preemption.deferred())
        numbered = enumerate(in_flight.timed_batches(batches), start=first + 1)
        state, exit_code = _run(job, numbered, state, in_flight, log, profile, place, checkpoints, preemption, watchdog)
        with watchdog.paused("saving"):
            checkpoints.wait()
            if exit_code != FAILED and checkpoints.exit_code == FAILED:  # a bucket that is away has been waited for
                _try_again(checkpoints, state)
        if checkpoints.failure:
            console.print(f"error: the last checkpoint is not saved: {checkpoints.failure}", style="red")
            exit_code = checkpoints.exit_code
    return state, exit_code


def _try_again(checkpoints: Checkpoints, state: TrainState) -> None:
    """Saves the last step again for a while if its save failed: the disk may be full only for now."""
    for _ in range(_TRIES):
        if not checkpoints.failure:
            return
        time.sleep(_RETRY_SECONDS)
        checkpoints.save_again(state)
        checkpoints.wait()


def _run(
    job: Job,
    batches: Iterable[tuple[int, FeedbackBatch]],
    state: TrainState,
    in_flight: StepsInFlight,
    log: MetricsLog,
    profile: Profile,
    place: RunPlace,
    checkpoints: Checkpoints,
    preemption: Preemption,
    watchdog: Watchdog,
) -> tuple[TrainState, int]:
    config, unusual = job.config, UnusualSteps(job.config, job.inputs)
    save_timer = SaveTimer(config.checkpoint.every_minutes)
    for step, batch in batches:
        profile.before(step)
        with contextlib.nullcontext() if job.take_step.is_ready(batch) else _paused("compiling", watchdog, log):
            state = in_flight.dispatch(step, job.take_step, state, batch)
        with watchdog.paused("saving"):
            checkpoints.poll()  # reads the last save back while the devices compute
        stopping, last = preemption.requested(), step == job.inputs.num_steps
        evaluating = job.evaluate is not None and (last or _is_due(step, config.evaluation.every))
        timed = job.saves and save_timer.due(step)
        due = job.saves and (timed or bool(checkpoints.failure) or _is_due(step, config.checkpoint.every))
        saving = stopping or (job.saves and (last or evaluating or due))
        figures: dict[str, float] = {}
        while len(in_flight) > (0 if last or evaluating or saving or profile.waits_after(step) else 1):
            number, figures = in_flight.read()
            watchdog.completed(number)
            failed = figures["num_bad_steps"] >= config.max_bad_steps
            if number == step and job.evaluate and evaluating and not failed:
                with _paused("evaluating", watchdog, log):
                    figures |= job.evaluate(state)
                job.patience.add(step, figures)
            log.write(number, figures)
            unusual.report(number, figures)
            if failed:
                return state, FAILED
        profile.after(step)
        if saving:
            # Losses relative to different references do not show which policy is best.
            comparable = not config.reference.sync_every
            with _paused("saving", watchdog, log):
                place.push()  # A checkpoint without the metrics before it could not be resumed.
                checkpoints.save(step, state, figures if comparable and evaluating else None)
            save_timer.restart(step)
        if job.patience.is_exhausted:
            return state, 0
        if stopping and not last:
            console.print(f"stopped by a signal after step {step}; run the same command to resume")
            return state, preemption.exit_code
        if not in_flight:
            in_flight.resume()
    return state, 0


@contextlib.contextmanager
def _paused(what: str, watchdog: Watchdog, log: MetricsLog) -> Iterator[None]:
    """Says that the run does something else than steps."""
    with watchdog.paused(what), log.doing(what):
        yield


def _batches(job: Job, steps: range) -> Iterator[FeedbackBatch]:
    """The batches of these steps, prefetched onto the devices."""
    schedule, mesh = job.inputs.schedule, job.mesh
    return prefetch(
        functools.partial(schedule.batch, rows=local_rows(mesh, schedule.microbatch_rows)),
        steps,
        finish=functools.partial(place_batch, mesh),
        num_loaders=job.config.data.num_loaders,
    )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Profile:
    """Traces a range of steps with JAX's profiler, on the first process, with no other step in flight.

    Args:
      folder: folder of the trace, for XProf and TensorBoard; Perfetto opens its perfetto_trace.json.gz.
      config: the steps to trace.
    """

    def __init__(self, folder: Path, config: ProfileConfig) -> None:
        self._folder = folder
        self._steps = range(config.start + 1, config.start + 1 + (config.steps if processes.is_first() else 0))
        self._edges = {config.start, config.start + config.steps} if config.steps else set()
        self._tracing = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def waits_after(self, step: int) -> bool:
        """Whether the step must complete before the next one is dispatched."""
        return step in self._edges

    def before(self, step: int) -> None:
        """Starts the trace, if it starts with this step or the run resumes within the range."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True

    def after(self, step: int) -> None:
        """Ends the trace, if it ends with this step."""
        if self._steps and step == self._steps[-1]:
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            console.print(f"traced steps {self._steps[0]} to {self._steps[-1]}: see {self._folder}")
