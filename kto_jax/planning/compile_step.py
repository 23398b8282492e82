"""Ahead-of-time compilation of a run's training step, from shapes alone: no weights, no feedback, no such devices."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kto_jax.config import Config, ConfigError
from kto_jax.data.batches.packing import num_slots
from kto_jax.devices.compilation import compile_lowered
from kto_jax.devices.sharding import abstract_batch, check_lengths
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.models.weights.load import read_config
from kto_jax.models.weights.model_files import CONFIG_FILES, find_model
from kto_jax.objectives import Objective, check_objective
from kto_jax.planning.hlo import Collective, find_collectives, refused_bytes
from kto_jax.planning.topology import Topology
from kto_jax.shapes import SAMPLED, FeedbackBatch, PackedRows, Sampled, power_of_two
from kto_jax.training.checks import check_conflicts
from kto_jax.training.flops import tokens_and_flops
from kto_jax.training.initial_state import make_abstract_state, make_model
from kto_jax.training.reference import choose_dtype
from kto_jax.training.step import jit_train_step, make_recipe

_NUM_STEPS = 1000  # Steps of the learning rate's schedule: a constant, which does not change the program otherwise.


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
      architecture: of policy and reference.
      objective: what is minimised, with its weights for equally many completions of both labels.
    """

    architecture: TransformerConfig
    objective: Objective


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The feedback that is assumed: every example has these lengths.

    Attributes:
      total: tokens of prompt and completion.
      completion: tokens of the completion.
    """

    total: int
    completion: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """The batch of a step; the letters are those of shapes.py.

    Attributes:
      rows: R, packed rows of a microbatch.
      row_length: L.
      completion_length: C.
      slots: S.
      room: M, microbatches that the arrays have room for.
      microbatches: how many of them are filled.
      sequences: completions per step; a pair has two.
    """

    rows: int
    row_length: int
    completion_length: int
    slots: int
    room: int
    microbatches: int
    sequences: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiled step: its memory, collectives and work.

    Attributes:
      config: of the run.
      mesh: size of each mesh axis.
      shape: of the batch.
      parts: bytes per device of policy, reference, moments and batch, from their shapes.
      arguments: bytes of all of these in the compiler's layout; None if it refused the program.
      temporaries: peak bytes of gradients, activations, gathered weights and code; if it refused, as in its message.
      refusal: the compiler's message; empty if it compiled.
      limit: bytes of memory per device.
      collectives: between the devices.
      tokens: tokens of matched completions and their prompts per step.
      flops: operations per step that the method needs, by formula: no recomputation, no padding.
      params: parameters of the model.
      active_params: those that a token passes through; fewer if the model is a mixture of experts.
      weight_bytes: bytes of weights that one pass of a model reads on each device, in the dtype of the products.
      gradient_bytes: bytes of the gradients of the layers' matrices that the devices sum for every microbatch, in
        `model.reduce_dtype`; 0 if no two devices share a gradient.
      passes: passes over a model's weights per step: each forward pass, and one more for each backward pass.
      compile_seconds: time of the compiler.
      host_bytes: peak memory of this process so far.
      sampling: bytes per device of the parts that online training needs while it samples; empty if it does not.
    """

    config: Config
    mesh: dict[str, int]
    shape: Shape
    parts: dict[str, int]
    arguments: int | None
    temporaries: int
    refusal: str
    limit: int
    collectives: tuple[Collective, ...]
    tokens: float
    flops: float
    params: int
    active_params: int
    weight_bytes: float
    gradient_bytes: float
    passes: int
    compile_seconds: float
    host_bytes: int
    sampling: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that a device needs; a lower bound if the program was refused."""
        return (sum(self.parts.values()) if self.arguments is None else self.arguments) + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether it compiled and each device has the memory."""
        return not self.refusal and self.total <= self.limit and sum(self.sampling.values()) <= self.limit


def read_task(config: Config) -> Task:
    """What the run trains. Only the model's config.json is read, also from the Hub.

    Raises:
      ConfigError: the model or the objective cannot be used.
    """
    objective = check_objective(config.objective)
    check_conflicts(config, objective)
    architecture = read_config(find_model(config.model.path, config.model.base, hub_files=CONFIG_FILES).weights)
    if config.data.max_length > architecture.max_length:
        raise ConfigError(
            f"config.data.max_length={config.data.max_length} is beyond the model's context of "
            f"{architecture.max_length} tokens. Allowed: up to {architecture.max_length}. Set config.data.max_length."
        )
    return Task(architecture, objective)


def assumed_shape(config: Config, objective: Objective, lengths: Lengths) -> Shape:
    """The batch that a step would have if every example had these lengths.

    Raises:
      ConfigError: such an example does not fit a packed row.
    """
    unit = 2 if objective.reads == "pairs" else 1
    shortest = config.data.max_length * unit
    row_length = shortest if config.row_length == "auto" else config.row_length or shortest
    completion_length = max(1, round(row_length * config.completion_share))
    sequences = config.batch_size * unit
    slots = num_slots(np.array([lengths.total]), row_length, sequences)
    per_row = min(row_length // lengths.total, completion_length // max(lengths.completion, 1), slots) // unit * unit
    if not per_row:
        raise ConfigError(
            f"--mean_length={lengths.total} with --mean_completion={lengths.completion} does not fit a packed row of "
            f"{row_length} tokens, {completion_length} of them for completions. Allowed: up to these. Set "
            "--mean_length and --mean_completion, or config.completion_share."
        )
    rows = int(config.microbatch_rows)
    microbatches = math.ceil(math.ceil(sequences / per_row) / rows)
    return Shape(
        rows=rows,
        row_length=row_length,
        completion_length=completion_length,
        slots=slots,
        room=power_of_two(microbatches),
        microbatches=microbatches,
        sequences=sequences,
    )


def empty_batch(shape: Shape, objective: Objective, *, precomputed: bool) -> FeedbackBatch:
    """A batch of this shape, of zeros that take no memory.

    Args:
      shape: of the batch.
      objective: which rows it reads.
      precomputed: whether the reference's log-probabilities come with it.
    """

    def zeros(room: int, size: int, dtype: type = np.int32) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), (room, shape.rows, size))

    def rows(room: int) -> PackedRows:
        long, short = zeros(room, shape.row_length), zeros(room, shape.completion_length)
        return PackedRows(long, long, long, short, short, short, zeros(room, shape.slots, np.bool_))

    unmatched = shape.room if objective.first_pass == "unmatched" else 0
    numbers = zeros(shape.room, shape.slots, np.float32)
    return FeedbackBatch(
        matched=rows(shape.room),
        desirable=zeros(shape.room, shape.slots, np.bool_),
        weights=numbers,
        scores=numbers,
        unmatched=rows(unmatched),
        num_matched=np.int32(shape.microbatches),
        num_unmatched=np.int32(shape.microbatches),
        matched_reference=numbers if precomputed else None,
        unmatched_reference=zeros(unmatched, shape.slots, np.float32) if precomputed else None,
        sampled=Sampled(*[zeros(shape.room, shape.completion_length, np.float32)] * len(SAMPLED))
        if objective.reads_sampled
        else None,
    )


def one_sequence(lengths: Lengths, *, precomputed: bool) -> FeedbackBatch:
    """A batch of one sequence in one row without padding, matched and unmatched: the unit of a step's work."""
    places = np.arange(lengths.total, dtype=np.int32)[None, None]
    short = np.ones((1, 1, lengths.completion), np.int32)
    rows = PackedRows(
        np.zeros_like(places), np.ones_like(places), places, short, short, short, np.ones((1, 1, 1), np.bool_)
    )
    one = np.ones((1, 1, 1), np.float32)
    reference = one if precomputed else None
    return FeedbackBatch(rows, rows.filled, one, one, rows, np.int32(1), np.int32(1), reference, reference)


def count_work(model: Model, objective: Objective, lengths: Lengths, *, precomputed: bool) -> tuple[float, float]:
    """Tokens and operations of one sequence in a step, as `flops.tokens_and_flops` counts them."""
    figures = tokens_and_flops(model, objective, one_sequence(lengths, precomputed=precomputed))
    return float(figures["tokens"]), float(figures["flops"])


def compile_step(
    config: Config, task: Task, topology: Topology, lengths: Lengths, options: Mapping[str, Any] | None = None
) -> CompiledStep:
    """Compiles the step that training would take if every example had these lengths.

    Args:
      config: the run.
      task: what is trained.
      topology: the devices.
      lengths: of the examples.
      options: of the compiler; None for those of a run.

    Raises:
      ConfigError: mesh, rows or model do not fit together.
    """
    shape = assumed_shape(config, task.objective, lengths)
    return compile_for(config, task, topology, shape, lengths, options=options)


def compile_for(
    config: Config,
    task: Task,
    topology: Topology,
    shape: Shape,
    lengths: Lengths,
    num_steps: int = _NUM_STEPS,
    options: Mapping[str, Any] | None = None,
) -> CompiledStep:
    """Compiles the step that training takes for batches of a shape.

    Args:
      config: the run.
      task: what is trained.
      topology: the devices.
      shape: of the batches.
      lengths: of the examples, for the count of work.
      num_steps: of the run; a constant in the program.
      options: of the compiler; None for those of a run.

    Raises:
      ConfigError: mesh, rows or model do not fit together.
    """
    config = choose_dtype(config, only_config=True)
    objective, precomputed = task.objective, config.reference.precompute
    mesh, model = make_model(config, task, topology.devices)
    check_lengths([shape.row_length], dict(mesh.shape))
    recipe = make_recipe(config, objective, model, num_steps)
    state = make_abstract_state(config, task, model, mesh, recipe.optimizer)
    batch = abstract_batch(mesh, empty_batch(shape, objective, precomputed=precomputed))
    trees = {"policy": state.policy, "reference": state.reference, "moments": state.opt_state, "batch": batch}
    parts = {name: device_bytes(tree) for name, tree in trees.items()}
    started = time.perf_counter()
    arguments, temporaries, refusal, collectives = _compile(
        jit_train_step(recipe), state, batch, parts, topology, options
    )
    seconds = time.perf_counter() - started
    tokens, flops = count_work(model, objective, lengths, precomputed=precomputed)
    width = np.dtype(jax.numpy.dtype(config.model.dtype)).itemsize
    return CompiledStep(
        config=config,
        mesh=dict(mesh.shape),
        shape=shape,
        parts=parts,
        arguments=arguments,
        temporaries=temporaries,
        refusal=refusal,
        limit=device_limit(topology),
        collectives=tuple(collectives),
        tokens=tokens * shape.sequences,
        flops=flops * shape.sequences,
        params=task.architecture.num_params(),
        active_params=task.architecture.num_active_params(),
        weight_bytes=_weights_per_device(task.architecture, dict(mesh.shape)) * width,
        gradient_bytes=_gradient_bytes(config, state.policy["layers"], dict(mesh.shape)),
        passes=shape.microbatches
        * (_passes_per_microbatch(objective, precomputed=precomputed) + (recipe.router.balance > 0)),
        compile_seconds=seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _weights_per_device(architecture: TransformerConfig, mesh: Mapping[str, int]) -> float:
    """Weights that a device multiplies with: all of a layer, but only its own experts, in parts by tensor."""
    per_expert = 3 * architecture.num_layers * architecture.embed_dim * architecture.mlp_dim
    elsewhere = architecture.num_experts * per_expert * (1 - 1 / mesh["expert"])
    return (architecture.num_params() - elsewhere) / mesh["tensor"]


def _passes_per_microbatch(objective: Objective, *, precomputed: bool) -> int:
    """Passes over a model's weights: the forward passes of policy and reference in each pass, and one backward pass."""
    models = 2 if objective.uses_reference and not precomputed else 1
    return models + 1 + (models if objective.first_pass != "none" else 0)


def _gradient_bytes(config: Config, layers: Any, mesh: Mapping[str, int]) -> float:
    summed_in = config.model.reduce_dtype if config.model.dtype == "bfloat16" else config.model.dtype
    summed, devices = 0.0, math.prod(mesh.values())
    for leaf in jax.tree.leaves(layers):
        # Devices along the expert axis share the gradients of all matrices but the experts', [layers, E, in, out].
        parts = mesh["tensor"] * (mesh["expert"] if leaf.ndim == 4 else 1)
        summed += leaf.size / parts if leaf.ndim >= 3 and parts < devices else 0
    return summed * jax.numpy.dtype(summed_in).itemsize


def _compile(
    step: Any,
    state: Any,
    batch: Any,
    parts: dict[str, int],
    topology: Topology,
    options: Mapping[str, Any] | None,
) -> tuple[int | None, int, str, list[Collective]]:
    """Bytes of arguments and temporaries, the compiler's refusal if it refused, and the collectives."""
    lowered = step.lower(state, batch)
    platform = topology.devices[0].platform
    try:
        compiled = compile_lowered(lowered, platform) if options is None else lowered.compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        sizes = refused_bytes(str(error))
        if sizes is None and "RESOURCE_EXHAUSTED" not in message:
            raise
        return None, sizes[0] - sum(parts.values()) if sizes else 0, message, []
    memory = compiled.memory_analysis()
    if topology.devices[0].platform == "cpu":
        # The CPU's peak does not include temporaries, which are one allocation.
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    else:
        # Less than the sum of its parts, which are never all in use at the same time.
        temporaries = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    temporaries += memory.generated_code_size_in_bytes
    collectives = find_collectives(
        compiled.as_text(), num_devices=len(topology.devices), num_slices=topology.num_slices
    )
    return memory.argument_size_in_bytes, temporaries, "", collectives


def device_bytes(abstract: Any) -> int:
    """Bytes per device of a tree of sharded shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )


def device_limit(topology: Topology) -> int:
    """Bytes of memory per device: as published; for local devices as they report, else a share of the host's memory."""
    if topology.chip:
        return topology.chip.hbm_bytes // topology.chip.devices
    # Only local devices can be asked.
    stated = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return stated or host_memory() // jax.local_device_count()


def host_memory(group: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of the host, or the limit of a container's control group if that is smaller."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = group.read_text().strip() if group.exists() else "max"
    return installed if allowed == "max" else min(installed, int(allowed))
