"""Computes all reference log-probabilities of a run up front; training then keeps no reference in memory.

They are cached under a key of all that determines them: the reference's weights, the index, the order and size of the
batches, the epochs, the truncation and the dtypes. A second run reuses them, and an interrupted one resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kto_jax.config import Config, ConfigError
from kto_jax.config.errors import PREEMPTED
from kto_jax.data.batches.prefetch import prefetch
from kto_jax.data.batches.reference_logps import ReferenceLogps, open_store
from kto_jax.data.batches.schedule import Schedule
from kto_jax.data.index.index import Index
from kto_jax.devices import processes
from kto_jax.devices.sharding import local_rows, place_batch
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.load import weights_digest
from kto_jax.progress import console, make_bar
from kto_jax.shapes import FeedbackBatch, PackedRows
from kto_jax.storage.folders import cache_directory
from kto_jax.training.forward import packed_logps
from kto_jax.training.initial_state import load_reference, reference_shardings
from kto_jax.training.inputs import Inputs
from kto_jax.training.microbatches import map_microbatches
from kto_jax.training.preemption import reached_sync_point
from kto_jax.training.run_folder import write_json

_FORMAT = 2
"""Version of the stores' format."""


def precompute(config: Config, inputs: Inputs, model: Model, mesh: Mesh, workdir: Path) -> Inputs:
    """Finds or computes the reference's log-probabilities for every step and evaluation of the run.

    The reference is loaded only if something is missing, and freed at the end.

    Args:
      config: the run.
      inputs: what it reads.
      model: the policy's model; the reference has the same architecture.
      mesh: the devices.
      workdir: the run's folder, which records the reference that the run started with.

    Returns:
      The inputs, with schedules whose batches hold the reference's log-probabilities.

    Raises:
      ConfigError: the reference is not the one that the run started with, a store cannot be used, or a completion's
        log-probability is not finite.
    """
    plain = dataclasses.replace(model, scalar_head="none")
    tasks = [("train", inputs.schedule, inputs.num_steps)]
    if inputs.held_out:
        tasks.append(("held-out", inputs.held_out, inputs.held_out.num_steps))
    weights = processes.call_on_all(lambda: _reference_digest(config, inputs, workdir))
    stores = processes.call_on_all(lambda: [_find_store(config, inputs, schedule, weights) for _, schedule, _ in tasks])
    missing = {
        name: processes.any_process(store.is_missing(num_steps))
        for store, (name, _, num_steps) in zip(stores, tasks, strict=True)
    }
    places = " and ".join(str(store.directory) for store in stores)
    num_missing = sum(int(np.sum(steps)) for steps in missing.values())
    console.print(f"reference log-probabilities: {num_missing} steps to compute, kept in {places}")
    if num_missing:
        reference = load_reference(config, inputs, plain, reference_shardings(config, plain, mesh))
        read = functools.partial(_jit_read(plain), reference)
        for store, (name, schedule, _) in zip(stores, tasks, strict=True):
            steps = np.flatnonzero(missing[name]).tolist()
            make = functools.partial(schedule.batch, rows=local_rows(mesh, schedule.microbatch_rows))
            place = functools.partial(place_batch, mesh)
            batches = prefetch(make, steps, finish=place, num_loaders=config.data.num_loaders)
            bar = make_bar(console)
            shown = bar.track(batches, len(steps), description=f"reference, {name}")
            with console.showing(bar.get_renderable):
                _fill(store, schedule, zip(steps, shown, strict=True), read, inputs.index)
    schedules = [schedule.with_reference_logps(store) for store, (_, schedule, _) in zip(stores, tasks, strict=True)]
    return dataclasses.replace(inputs, schedule=schedules[0], held_out=schedules[1] if inputs.held_out else None)


def _fill(
    store: ReferenceLogps,
    schedule: Schedule,
    batches: Iterable[tuple[int, FeedbackBatch]],
    read: Callable[[PackedRows, Array], Array],
    index: Index,
) -> None:
    """Computes and stores the log-probabilities of these steps; ends the process if it is preempted."""
    unknown = processes.any_process(np.isnan(store.matched))
    for step, batch in batches:
        sequences = schedule.step(step).ids
        matched, unmatched = _compute_step(schedule, step, batch, read, reads_matched=unknown[sequences].any())
        unknown[sequences] = False
        for logps in (matched, unmatched):
            _check_finite(logps, sequences, index)
        store.write(step, sequences, matched, unmatched)
        if processes.num_processes() > 1 and reached_sync_point():
            sys.exit(PREEMPTED)


def _reference_digest(config: Config, inputs: Inputs, workdir: Path) -> str:
    """The digest of the reference's weights, which must be the same as at the run's start."""
    if config.model.init == "random" and not config.reference.path:
        return f"random {config.seed} {inputs.architecture}"
    weights, path = weights_digest(inputs.reference_files), workdir / "reference.json"
    if path.exists() and (before := json.loads(path.read_text())["weights"]) != weights:
        raise ConfigError(
            f"the weights in {inputs.reference_files} have changed since the run in {workdir} began (digest "
            f"{weights[:16]}, was {before[:16]}). Its reference must not change. Restore them, or choose another "
            "--workdir."
        )
    if processes.is_first():
        write_json(path, {"weights": weights})
    return weights


def _find_store(config: Config, inputs: Inputs, schedule: Schedule, weights: str) -> ReferenceLogps:
    parts = [_FORMAT, weights, schedule.key, config.model.dtype, config.reference.param_dtype]
    if not config.reference.path and config.model.param_dtype != "float32":
        parts.append(config.model.param_dtype)  # The reference is the policy's initial weights in their dtype.
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    directory = cache_directory() / "reference_logps" / key[:16]
    return open_store(directory, len(inputs.index.splits), schedule.num_steps, schedule.max_sequences)


def _jit_read(model: Model) -> Callable[[Params, PackedRows, Array], Array]:
    """The compiled function: (parameters, rows, number of microbatches) -> log-probabilities [M, R, S]."""

    def read(params: Params, rows: PackedRows, count: Int[Array, ""]) -> Float[Array, "M R S"]:
        return map_microbatches(functools.partial(packed_logps, model, params), rows, count)

    return jax.jit(read)


def _compute_step(
    schedule: Schedule,
    step: int,
    batch: FeedbackBatch,
    read: Callable[[PackedRows, Array], Array],
    *,
    reads_matched: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a step's sequences, matched and unmatched; matched is empty if they are not needed."""
    nothing = np.zeros(batch.matched.filled.shape, np.float32)
    matched = processes.gather(read(batch.matched, batch.num_matched)) if reads_matched else nothing
    unmatched = processes.gather(read(batch.unmatched, batch.num_unmatched)) if schedule.reads_unmatched else nothing
    matched, unmatched = schedule.by_sequence(step, matched, unmatched)
    return matched if reads_matched else matched[:0], unmatched


def _check_finite(logps: np.ndarray, sequences: np.ndarray, index: Index) -> None:
    broken = sequences[: len(logps)][~np.isfinite(logps)]
    if len(broken):
        places = ", ".join(index.place(sequence) for sequence in broken[:5])
        raise ConfigError(
            f"the reference gives {len(broken)} completions a log-probability that is not finite, among them {places}. "
            "Every number must be finite. Look at these rows, or at config.reference.path and model.dtype."
        )
