"""Memory of sampling in online training, between the updates: weights in the compute dtype, the KV cache, and the
training state, which stays on the devices from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import Config
from kto_jax.devices.sharding import ACTIVATION_RULES, num_parts
from kto_jax.models.transformer import CACHE_AXES
from kto_jax.planning.compile_step import Task, device_bytes
from kto_jax.sampling.slots import PREFIX_ROWS
from kto_jax.training.initial_state import abstract_params, make_abstract_state, make_model
from kto_jax.training.step import make_recipe


def sampling_bytes(config: Config, task: Task, devices: Sequence[jax.Device], num_slots: int) -> dict[str, int]:
    """Bytes per device while completions are sampled over the mesh, by part.

    Args:
      config: the run.
      task: what is trained.
      devices: of the mesh.
      num_slots: completions sampled at once; raised to the next multiple of data × fsdp, as sampling does.
    """
    mesh, model = make_model(config, task, devices)
    parts = num_parts(mesh, ACTIVATION_RULES["rows"])
    rows = sum(-(-count // parts) * parts for count in (num_slots, min(PREFIX_ROWS, num_slots)))
    # At the longest: prompt and completion fill data.max_length.
    cache = jax.eval_shape(lambda: model.init_cache(rows, config.data.max_length))
    sharding = NamedSharding(mesh, PartitionSpec(*(ACTIVATION_RULES[axis] for axis in CACHE_AXES)))
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), cache)
    optimizer = make_recipe(config, task.objective, model, num_steps=1).optimizer
    return {
        "training state": device_bytes(make_abstract_state(config, task, model, mesh, optimizer)),
        "weights for sampling": device_bytes(abstract_params(mesh, model, config.model.dtype)),
        "KV cache": device_bytes(placed),
    }
