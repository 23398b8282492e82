"""Log-probabilities of sampled tokens as training computes them, before the update: the old ones of a round.

They are computed once and kept, so that every epoch of the round, and a run that is resumed in one, has the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from kto_jax.data.batches.packing import RowShape, fill, pack
from kto_jax.devices import processes
from kto_jax.devices.sharding import local_rows, place_batch
from kto_jax.models.model import Model, Params
from kto_jax.shapes import PackedRows
from kto_jax.storage.atomic import new_file
from kto_jax.training.forward import completion_states, token_values

_SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures of sampled completions, one array [completion] float32 for each.

    Attributes:
      logps: log-probability of each token, in nats.
      values: the value head's estimate before each token; 0 without one.
    """

    logps: list[np.ndarray]
    values: list[np.ndarray]


def measure(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    *,
    row_length: int,
    microbatch_rows: int,
    mesh: Mesh | None = None,
) -> Measured:
    """Reads sampled completions with the forward pass of training, in packed rows.

    Args:
      model: the policy or the reference; a value head is read if it has one.
      params: its parameters.
      prompts: token ids of each completion's prompt.
      completions: token ids of each, its EOS included if it has one.
      row_length: tokens of a packed row, at least those of the longest prompt and completion together.
      microbatch_rows: rows read at once.
      mesh: that holds the parameters, over all processes, which must all make this call; None for one device.

    Returns:
      The figures, in the given order.
    """
    num_prompt, num_completion = (np.array([len(each) for each in ids]) for ids in (prompts, completions))
    shape = RowShape(row_length, row_length, _SLOTS)
    packing = pack(num_prompt, num_completion, shape)
    num_microbatches = -(-packing.num_rows // microbatch_rows)
    rows = fill(
        packing,
        lambda i: (prompts[i], completions[i]),
        num_microbatches=num_microbatches,
        microbatch_rows=microbatch_rows,
        rows=slice(None) if mesh is None else local_rows(mesh, microbatch_rows),
        shape=shape,
    )
    place = functools.partial(place_batch, mesh) if mesh is not None else lambda one: one
    gather = processes.gather if mesh is not None else jax.device_get
    found = [
        gather(_read(model, params, place(jax.tree.map(lambda x, m=m: x[m : m + 1], rows))))
        for m in range(num_microbatches)
    ]
    logps, values = (np.concatenate([x[0] for x in each]) for each in zip(*found, strict=True))

    def of_completions(figures: np.ndarray) -> list[np.ndarray]:
        places = zip(packing.rows, packing.completion_starts, num_completion, strict=True)
        return [figures[row, start : start + count] for row, start, count in places]

    return Measured(of_completions(logps), of_completions(values))


@functools.partial(jax.jit, static_argnames="model")
def _read(model: Model, params: Params, rows: PackedRows) -> tuple[Array, Array]:
    """Log-probabilities and values of one microbatch [1, R, C]."""
    one = jax.tree.map(lambda x: x[0], rows)
    hidden_RCD = completion_states(model, params, one)
    logps_RC = model.token_logps(params, hidden_RCD, one.targets)
    values_RC = jnp.zeros_like(logps_RC)
    if model.scalar_head == "value":
        values_RC = token_values(model, params, one, hidden_RCD)
    return logps_RC[None], values_RC[None]


def write_figures(path: Path, figures: dict[str, list[np.ndarray]]) -> None:
    """Writes lists of arrays of equal lengths, by name."""
    lengths = [len(each) for each in next(iter(figures.values()))]
    joined = {name: np.concatenate(arrays) for name, arrays in figures.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(file, lengths=np.asarray(lengths), **joined)  # type: ignore[arg-type]


def read_figures(path: Path) -> dict[str, list[np.ndarray]]:
    """What `write_figures` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        return {name: np.split(stored[name], ends) for name in stored.files if name != "lengths"}
