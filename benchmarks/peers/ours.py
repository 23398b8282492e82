"""Our training step, on the batches that the parent packed or padded: contenders `kto_jax` and `padded`."""

from __future__ import annotations

from benchmarks.peers.jax_turn import load_batch, load_policy, take_turn
from benchmarks.peers.turn import read_job
from kto_jax.config import resolve
from kto_jax.devices.sharding import place_batch
from kto_jax.objectives import make_objective
from kto_jax.training.state import create_state
from kto_jax.training.step import jit_train_step, make_recipe


def main() -> None:
    """Runs the job."""
    job = read_job()
    config = resolve(job["config"])
    mesh, model, policy = load_policy(job, config.model.remat)
    objective = make_objective(config.objective, num_desirable=1, num_undesirable=1)
    recipe = make_recipe(config, objective, model, len(job["batches"]))
    step = jit_train_step(recipe)
    state = create_state(policy, policy, recipe.optimizer, mesh, objective.initial_state)
    del policy
    take_turn(job, step, state, [place_batch(mesh, load_batch(path)) for path in job["batches"]])


if __name__ == "__main__":
    main()
