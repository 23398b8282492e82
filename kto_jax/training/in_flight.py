"""Steps that were dispatched and whose figures are still to be read, with the times of each."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from kto_jax.devices.compilation import Program
from kto_jax.shapes import FeedbackBatch
from kto_jax.training.logs import console
from kto_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step on the devices. Times are readings of one clock, in seconds."""

    step: int
    resumed: float
    asked: float
    arrived: float
    dispatched: float
    compile_seconds: float
    result: concurrent.futures.Future[tuple[dict[str, float], float]]


class StepsInFlight:
    """Dispatches steps without waiting for them; reads their figures later, in order.

    A thread waits for each step and notes when it completed, so the times do not depend on when a row is read.

        seconds           from the completion of the step before to that of this step, without the two below
        wait_seconds      of that time, how long the devices had nothing to do because the batch was not there
        compile_seconds   how long the step waited for its program, if that had to be compiled

    Evaluations and saves lie between steps: the time of the next step begins when the loop resumes. The seconds of all
    rows, their waits, and those pauses add up to the wall time of the loop.

    Args:
      peak: FLOP/s of all devices together.
      peak_is_measured: whether `peak` was measured rather than published. A step that is faster than a measured peak
        shows that the devices were busy with something else when it was measured, and raises it.
      clock: seconds from any beginning.
    """

    def __init__(self, peak: float, *, peak_is_measured: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.peak = peak
        self._peak_is_measured = peak_is_measured
        self._clock = clock
        self._steps: collections.deque[_Dispatched] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="figures")
        self._completed = float("-inf")
        self._resumed = self._asked = self._arrived = clock()

    def __enter__(self) -> StepsInFlight:
        return self

    def __exit__(self, *error: object) -> None:
        # After an error a step may never complete.
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self._steps)

    def resume(self) -> None:
        """Begins to count the time of the next step, after a pause with no step in flight."""
        self._resumed = self._clock()

    def arriving(self, batches: Iterable[FeedbackBatch]) -> Iterator[FeedbackBatch]:
        """The batches, each with a note of how long it was waited for."""
        batches = iter(batches)
        end = object()
        while True:
            self._asked = self._clock()
            batch: Any = next(batches, end)
            self._arrived = self._clock()
            if batch is end:
                return
            yield batch

    def dispatch(self, step: int, program: Program, state: TrainState, batch: FeedbackBatch) -> TrainState:
        """Hands a step to the devices; returns its state, which is there once the step completes.

        Args:
          step: the number of the step, from 1.
          program: the training step.
          state: the state before; its memory is reused.
          batch: the step's batch, the last one that arrived.
        """
        rows = " × ".join(map(str, batch.matched.tokens.shape))
        if not program.is_ready(batch):
            console.print(f"compiling the step for rows of {rows} tokens …")
        compiling = program.compile_seconds
        with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("step", step_num=step):
            started = self._clock()
            state, figures = program(state, batch)
        compiling = program.compile_seconds - compiling
        if compiling:
            console.print(f"compiled for rows of {rows} tokens; the step waited {compiling:.1f} s")
        result = self._thread.submit(self._await, figures)
        times = (self._resumed, self._asked, self._arrived, started + compiling)
        self._steps.append(_Dispatched(step, *times, compiling, result))
        return state

    def _await(self, device_figures: Mapping[str, jax.Array]) -> tuple[dict[str, float], float]:
        figures = {name: float(value) for name, value in jax.device_get(device_figures).items()}
        return figures, self._clock()

    def read(self) -> tuple[int, dict[str, float]]:
        """Waits for the oldest step in flight; returns its number and its figures with its times."""
        done = self._steps.popleft()
        figures, completed = done.result.result()
        begun = max(self._completed, done.resumed)
        waited = max(done.arrived - max(done.asked, begun), 0.0)
        compiled = max(done.dispatched - max(done.dispatched - done.compile_seconds, begun), 0.0)
        seconds = max(completed - begun - waited - compiled, 1e-9)
        self._completed = completed
        self._raise_peak(figures["flops"] / seconds)
        figures["seconds"] = seconds
        if done.compile_seconds:
            figures["compile_seconds"] = done.compile_seconds
        figures["wait_seconds"] = waited
        figures["tokens_per_second"] = figures["tokens"] / seconds
        figures["mfu"] = figures["flops"] / seconds / self.peak
        return done.step, figures

    def _raise_peak(self, rate: float) -> None:
        if self._peak_is_measured and rate > self.peak:
            console.print(
                f"a step reached {rate / 1e9:.0f} GFLOP/s, above the {self.peak / 1e9:.0f} GFLOP/s measured at the "
                "start, when the devices must have been busy: mfu is a share of the higher figure from here on",
                style="yellow",
            )
            self.peak = rate
