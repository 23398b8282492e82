"""Dispatched steps whose metrics have not been read yet, with the timing of each."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from kto_jax.devices.compilation import Program
from kto_jax.progress import console
from kto_jax.shapes import FeedbackBatch
from kto_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A dispatched step. Times are readings of one clock, in seconds."""

    step: int
    resumed: float
    asked: float
    arrived: float
    dispatched: float
    compile_seconds: float
    result: concurrent.futures.Future[tuple[dict[str, float], float]]


class StepsInFlight:
    """Dispatches steps asynchronously; reads their metrics later, in order.

    A thread waits for each step and records when it completed, so timing does not depend on when metrics are read.

        seconds           from the previous step's completion to this step's, without the two below
        wait_seconds      idle time of the devices because the batch was not ready
        compile_seconds   time that the step waited for compilation, if it had to

    Evaluations and saves happen between steps: the next step's time starts when the loop resumes. Seconds, waits,
    compilation and these pauses add up to the wall time of the loop.

    Args:
      peak: FLOP/s of all devices together.
      peak_is_measured: whether `peak` was measured, not published. A step that is faster than a measured peak shows
        that the devices were busy during the measurement; it raises the peak.
      clock: returns seconds from an arbitrary origin.
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
        """Starts timing the next step, after a pause with no step in flight."""
        self._resumed = self._clock()

    def timed_batches(self, batches: Iterable[FeedbackBatch]) -> Iterator[FeedbackBatch]:
        """Yields the batches, and records how long each was waited for."""
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
        """Dispatches a step; returns its state, which is ready when the step completes.

        Args:
          step: the step's number, from 1.
          program: the training step.
          state: the state before; its buffers are donated.
          batch: the step's batch, the last one from `timed_batches`.
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
        """Waits for the oldest step in flight; returns its number and its metrics, with its timing."""
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
                "start, when the devices must have been busy: mfu is relative to the higher figure from here on",
                style="yellow",
            )
            self.peak = rate
