"""Runs a JAX contender: compiles ahead of time, then times steps until the new state is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers.turn import report
from kto_jax.config import MeshConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.compilation import give_back_memory
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.shapes import FeedbackBatch, PackedRows


def load_policy(job: dict[str, Any], remat: Any) -> tuple[jax.sharding.Mesh, Model, Params]:
    """The first device, the model and its weights in float32, as in a kto_jax run."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Model.create(
        read_config(job["model"]),
        dtype=job["dtype"],
        remat=remat,
        layout=make_layout(mesh),
    )
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    return mesh, model, load_params(model, job["model"], param_dtype="float32", shardings=layout)


def take_turn(job: dict[str, Any], step: Any, state: Any, batches: Sequence[Any]) -> None:
    """Takes a step on every batch and reports each one's seconds and loss.

    Programs for all batch shapes are compiled before the first step, so no compilation is timed.

    Args:
      job: the parent's job.
      step: a jitted function, (state, batch) -> (state, figures), that donates the state's buffers.
      state: the initial state.
      batches: the first is for the warm-up.
    """
    start = time.perf_counter()
    programs: dict[str, Callable] = {}
    for batch in batches:
        if (shape := _shape(batch)) not in programs:
            programs[shape] = step.lower(state, batch).compile()
            give_back_memory()
    compile_seconds = time.perf_counter() - start

    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        state, figures = jax.block_until_ready(programs[_shape(batch)](state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(figures["loss"]))
    if job["profile"]:
        with jax.profiler.trace(job["profile"], create_perfetto_trace=True):
            jax.block_until_ready(programs[_shape(batches[-1])](state, batches[-1]))
    on_device = jax.devices()[0].memory_stats() or {}
    report(
        job,
        seconds=seconds,
        losses=losses,
        compile_seconds=compile_seconds,
        programs=len(programs),
        device_peak_bytes=on_device.get("peak_bytes_in_use"),
        versions={"jax": jax.__version__},
    )


def _shape(batch: Any) -> str:
    return str([leaf.shape for leaf in jax.tree.leaves(batch)])


def save_batch(path: Path, batch: FeedbackBatch) -> None:
    """Writes a batch as an .npz file."""
    flat, _ = jax.tree_util.tree_flatten_with_path(batch)
    np.savez(path, **{jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in flat})


def load_batch(path: str) -> FeedbackBatch:
    """Reads a batch that `save_batch` wrote."""
    with np.load(path) as file:
        rows: dict[str, dict[str, np.ndarray]] = {"matched": {}, "unmatched": {}}
        others: dict[str, Any] = {}
        for name in file.files:
            owner, _, field = name.rpartition(".")
            (rows[owner] if owner else others)[field] = file[name]
    return FeedbackBatch(**{name: PackedRows(**fields) for name, fields in rows.items()}, **others)
