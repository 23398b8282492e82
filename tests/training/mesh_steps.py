"""Ten steps over any mesh, in this process or over several.

`python -m tests.training.mesh_steps OUT sgd data,fsdp,sequence,tensor,expert`
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from kto_jax.config import MeshConfig, ObjectiveConfig, ProcessesConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.processes import gather, is_first, join
from kto_jax.devices.sharding import local_rows, make_mesh, place_batch, row_parts, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.objectives import make_objective
from kto_jax.training.routers import NO_ROUTERS, RouterWeights
from kto_jax.training.state import create_state
from kto_jax.training.step import Recipe, jit_train_step
from tests.synthetic import make_index, make_schedule

NUM_STEPS, BATCH, MAX_LENGTH, ROWS = 10, 32, 38, 8
# Everything that a mesh splits divides by 8, and query heads share keys and values.
CONFIG = TransformerConfig(
    vocab_size=104, embed_dim=32, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=4, mlp_dim=64, tied_head=True
)
# The same as a mixture of experts, whose routers' losses are large enough to be seen.
EXPERTS = dataclasses.replace(CONFIG, mlp_dim=16, num_experts=8, experts_per_token=2)
ROUTER = RouterWeights(balance=0.1, z=0.01)
OBJECTIVE = make_objective(ObjectiveConfig(desirable_weight=1.5, beta=0.3), num_desirable=1, num_undesirable=1)
# Compute dtype and learning rate of the ten steps: SGD's steps are as long as its gradients.
OPTIMIZERS = {"sgd": ("float32", optax.sgd(0.3)), "adamw": ("float64", optax.adamw(1e-2, weight_decay=0.1))}


def first_weights(config, dtype, layout):
    """A policy and a reference far apart: the reference is more confident, so z0 is clearly positive."""
    model = Model.create(config, dtype="float32")
    policy, noise = (jax.device_get(model.init_params(jax.random.key(seed), "float32")) for seed in (0, 1))
    reference = jax.tree.map(lambda leaf, other: leaf + 2 * other, policy, noise)
    place = lambda leaf, sharding: jax.make_array_from_callback(  # noqa: E731
        leaf.shape, sharding, lambda part: leaf[part].astype(dtype)
    )
    return jax.tree.map(place, policy, layout), jax.tree.map(place, reference, layout)


def ten_steps(name, mesh_config, devices, config=CONFIG):
    """Loss, z0 and gradient norm of every step, the rows that it read, and the policy before and after."""
    dtype, optimizer = OPTIMIZERS[name]
    mesh = make_mesh(mesh_config, devices)
    model = Model.create(
        config,
        dtype=dtype,
        layout=make_layout(mesh),
    )
    layout = shardings(mesh, model.logical_axes(), model.abstract_params(dtype))
    state = create_state(*first_weights(config, dtype, layout), optimizer, mesh, {})
    # Devices that share a row process one row at a time. The number of rows does not change the results.
    rows_at_once = row_parts(mesh.shape) if mesh.shape["sequence"] > 1 else ROWS
    plan = make_schedule(
        make_index(5 * BATCH, vocab_size=CONFIG.vocab_size, max_length=MAX_LENGTH),
        batch_size=BATCH, seed=3, epochs=2, row_length=80, microbatch_rows=rows_at_once, max_length=MAX_LENGTH,
    )  # fmt: skip
    assert plan.num_steps == NUM_STEPS
    router = ROUTER if config.num_experts else NO_ROUTERS
    step = jit_train_step(Recipe(model, OBJECTIVE, optimizer, optax.constant_schedule(0.0), router=router))
    before, log = gather(state.policy), []
    for number in range(NUM_STEPS):
        state, figures = step(state, place_batch(mesh, plan.batch(number, local_rows(mesh, rows_at_once))))
        log.append([float(figures[key]) for key in ("loss", "z0", "grad_norm")])
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    rows = [[plan.step(number).ids, plan.step(number).partners] for number in range(NUM_STEPS)]
    return {"log": np.array(log), "rows": np.array(rows), "before": flat(before), "after": flat(gather(state.policy))}


def main():
    out, name, sizes = sys.argv[1:]
    join(ProcessesConfig(timeout_seconds=60))
    jax.config.update("jax_enable_x64", OPTIMIZERS[name][0] == "float64")
    results = ten_steps(name, MeshConfig(*map(int, sizes.split(","))), jax.devices())
    if is_first():
        # Written atomically: the reader waits for it.
        np.savez(Path(out).with_suffix(".part.npz"), **results)
        os.replace(Path(out).with_suffix(".part.npz"), out)


if __name__ == "__main__":
    main()
