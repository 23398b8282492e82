"""Evaluation of a policy on held-out feedback."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from kto_jax.data.batches.prefetch import prefetch
from kto_jax.data.batches.schedule import Schedule
from kto_jax.devices import processes
from kto_jax.devices.sharding import local_rows, place_batch
from kto_jax.models.model import Model
from kto_jax.objectives import Objective
from kto_jax.training.metrics import auc
from kto_jax.training.state import TrainState
from kto_jax.training.step import jit_evaluation_step, reference_error


def measure_reference(
    model: Model, objective: Objective, schedule: Schedule, mesh: Mesh, state: TrainState
) -> dict[str, float]:
    """The effect of rounding the reference, measured on the first batch: see `step.reference_error`."""
    batch = place_batch(mesh, schedule.batch(0, rows=local_rows(mesh, schedule.microbatch_rows)))
    figures = jax.jit(functools.partial(reference_error, model, objective))(state, batch)
    return {name: float(value) for name, value in jax.device_get(figures).items()}


def make_evaluation(
    model: Model, objective: Objective, schedule: Schedule, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """Makes the function that evaluates a state on the held-out feedback.

    Each batch has its own z0, as in training. The function returns eval_loss (mean over all examples), eval_margin and
    eval_auc (over all completions), and eval_z0 (mean over batches) if there is a z0.
    """
    objective = objective.evaluated_as or objective
    step = jit_evaluation_step(model, objective)

    def evaluate(state: TrainState) -> dict[str, float]:
        loss, num_examples, z0, rewards, desirable = 0.0, 0, [], [], []
        rows = local_rows(mesh, schedule.microbatch_rows)
        place = functools.partial(place_batch, mesh)
        for batch in prefetch(functools.partial(schedule.batch, rows=rows), range(schedule.num_steps), finish=place):
            figures, batch_rewards, _ = step(state, batch)
            figures = jax.device_get(figures)
            batch_rewards, filled, labels = processes.gather((batch_rewards, batch.matched.filled, batch.desirable))
            loss += float(figures["loss_sum"])
            num_examples += int(np.sum(objective.counts(filled, labels)))
            z0 += [float(figures["z0"])] if "z0" in figures else []
            rewards.append(batch_rewards[filled])
            desirable.append(labels[filled])
        rewards_B, desirable_B = np.concatenate(rewards), np.concatenate(desirable)
        good, bad = rewards_B[desirable_B], rewards_B[~desirable_B]
        return {
            "eval_loss": loss / max(num_examples, 1),
            **({"eval_z0": float(np.mean(z0))} if z0 else {}),
            "eval_margin": float(np.mean(good) - np.mean(bad)) if len(good) and len(bad) else float("nan"),
            "eval_auc": float(auc(*jax.device_put((rewards_B, desirable_B, np.ones_like(desirable_B))))),
        }

    return evaluate
