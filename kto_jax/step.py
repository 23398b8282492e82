"""One training step: log-probabilities, the reference point of the whole batch, gradients, the update.

Pass 1, without gradient, reads the unmatched pairs of all microbatches and makes one z0. Pass 2 takes gradients
microbatch by microbatch. Sums are divided once, by the count of the whole batch, so that neither devices nor
microbatches change the numbers. Microbatches have one shape and a traced count: one program serves every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kto_jax import metrics
from kto_jax.losses import segment_sums, token_logps
from kto_jax.models.model import Model, Params
from kto_jax.objectives import Objective
from kto_jax.shapes import FeedbackBatch, PackedRows
from kto_jax.state import TrainState

Figures = dict[str, Float[Array, ""]]


def packed_logps(model: Model, params: Params, rows: PackedRows) -> Float[Array, "R S"]:
    """Log-probability of the completion in each slot of one microbatch, in nats; 0 in empty slots."""
    hidden_RLD = model.hidden_states(params, rows.tokens, rows.segment_ids, rows.positions)
    hidden_RCD = jnp.take_along_axis(hidden_RLD, rows.predictors[..., None], axis=1)
    hidden_RCD = model.constrain(hidden_RCD, ("rows", "length", "embed"))
    # Laid out once, before the loop over chunks: gathered over fsdp, split over tensor.
    head_DV = model.constrain(model.head(params), ("embed", "vocab"))
    logps_RC = token_logps(hidden_RCD, head_DV, rows.targets)
    num_slots = rows.filled.shape[-1]
    return jax.vmap(lambda values, ids: segment_sums(values, ids - 1, num_slots, where=ids > 0))(
        logps_RC, rows.target_segments
    )


def _microbatch(rows: PackedRows, index: Int[Array, ""]) -> PackedRows:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), rows)


def _logps_by_microbatch(
    model: Model, policy: Params, reference: Params, rows: PackedRows, count: Int[Array, ""]
) -> tuple[Float[Array, "M R S"], Float[Array, "M R S"]]:
    """Policy and reference log-probabilities of all microbatches, without gradient."""

    def body(index: Int[Array, ""], logps: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        microbatch = _microbatch(rows, index)
        return (
            logps[0].at[index].set(packed_logps(model, policy, microbatch)),
            logps[1].at[index].set(packed_logps(model, reference, microbatch)),
        )

    empty = jnp.zeros(rows.filled.shape, jnp.promote_types(model.dtype, jnp.float32))
    return jax.lax.fori_loop(0, count, body, (empty, empty))


def reference_point(
    model: Model, objective: Objective, policy: Params, reference: Params, batch: FeedbackBatch
) -> tuple[Float[Array, ""], Figures]:
    """z0 of the global batch, and what is known about it.

    Returns:
      z0 in nats, and figures: z0, kl (the unclamped mean log-ratio of the unmatched pairs), kl_standard_error,
      num_unmatched.
    """
    policy_logps, reference_logps = _logps_by_microbatch(model, policy, reference, batch.unmatched, batch.num_unmatched)
    where = batch.unmatched.filled
    z0 = objective.reference_point(policy_logps, reference_logps, where)
    log_ratios = policy_logps - reference_logps
    return z0, {
        "z0": z0,
        "kl": metrics.mean(log_ratios, where),
        "kl_standard_error": metrics.standard_error(log_ratios, where),
        "num_unmatched": jnp.sum(where).astype(z0.dtype),
    }


def loss_and_gradient(
    model: Model, objective: Objective, policy: Params, reference: Params, batch: FeedbackBatch, z0: Float[Array, ""]
) -> tuple[Float[Array, ""], Params, Float[Array, "M R S"]]:
    """Weighted mean loss over the examples of the global batch, its gradient, and the log-ratios.

    The loss is Σ weight · loss / number of examples: a weight of 2 counts an example twice.
    """
    num_examples = jnp.maximum(jnp.sum(batch.matched.filled), 1)
    dtype = jnp.promote_types(model.dtype, jnp.float32)

    def share_of_loss(params: Params, index: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        microbatch = _microbatch(batch.matched, index)
        reference_logps = packed_logps(model, reference, microbatch)
        policy_logps = packed_logps(model, params, microbatch)
        losses = objective.loss(policy_logps, reference_logps, batch.desirable[index], z0)
        weighted = jnp.where(microbatch.filled, losses * batch.weights[index], 0)
        return jnp.sum(weighted) / num_examples, policy_logps - reference_logps

    def body(index: Int[Array, ""], carry: tuple[jax.Array, Params, jax.Array]) -> tuple[jax.Array, Params, jax.Array]:
        loss, gradient, log_ratios = carry
        (part, part_ratios), part_gradient = jax.value_and_grad(share_of_loss, has_aux=True)(policy, index)
        return (
            loss + part,
            jax.tree.map(lambda total, new: total + new.astype(total.dtype), gradient, part_gradient),
            log_ratios.at[index].set(part_ratios),
        )

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), policy)
    start = (jnp.zeros((), dtype), zeros, jnp.zeros(batch.matched.filled.shape, dtype))
    return jax.lax.fori_loop(0, batch.num_matched, body, start)


def _figures(objective: Objective, log_ratios: jax.Array, batch: FeedbackBatch, z0: jax.Array) -> Figures:
    return metrics.feedback_figures(
        objective.beta * log_ratios.reshape(-1),
        batch.desirable.reshape(-1),
        batch.matched.filled.reshape(-1),
        objective.beta * z0,
    )


def work(model: Model, batch: FeedbackBatch) -> Figures:
    """What the step has to do for a batch, whatever it does besides: the numerators of tokens/s and MFU.

    Returns:
      tokens: real tokens of the matched rows. flops: the policy's forward and backward pass and the reference's forward
      pass over the matched rows, and both forward passes over the unmatched ones, at real tokens.
    """

    def forward(rows: PackedRows) -> tuple[jax.Array, jax.Array]:
        real = rows.segment_ids > 0
        tokens = jnp.sum(real).astype(jnp.float32)
        attended = jnp.sum(jnp.where(real, rows.positions + 1, 0).astype(jnp.float32))
        completions = jnp.sum(rows.target_segments > 0).astype(jnp.float32)
        body = model.config.flops_per_token(attended=0, head=False)
        head = model.config.flops_per_token(attended=0, head=True) - body
        attention = model.config.flops_per_token(attended=1, head=False) - body
        return tokens, body * tokens + attention * attended + head * completions

    tokens, matched = forward(batch.matched)
    return {"tokens": tokens, "flops": 4 * matched + 2 * forward(batch.unmatched)[1]}


def train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    batch: FeedbackBatch,
) -> tuple[TrainState, Figures]:
    """One step. A loss or gradient that is not finite leaves policy and optimizer as they were and is counted.

    Returns:
      The next state, and the figures that docs/metrics.md explains.
    """
    z0, figures = reference_point(model, objective, state.policy, state.reference, batch)
    loss, gradient, log_ratios = loss_and_gradient(model, objective, state.policy, state.reference, batch, z0)
    grad_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.policy)
    policy = optax.apply_updates(state.policy, updates)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old)

    next_state = dataclasses.replace(
        state,
        step=state.step + 1,
        policy=jax.tree.map(keep, policy, state.policy),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        num_bad_steps=jnp.where(finite, 0, state.num_bad_steps + 1),
    )
    figures |= _figures(objective, log_ratios, batch, z0) | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step),
        "num_bad_steps": next_state.num_bad_steps,
        "examples": jnp.sum(batch.matched.filled),
    }
    return next_state, figures | work(model, batch)


def evaluation_step(
    model: Model, objective: Objective, policy: Params, reference: Params, batch: FeedbackBatch
) -> tuple[Figures, Float[Array, "M R S"]]:
    """Loss and z0 of one held-out batch, and the rewards of its slots, for figures over all of them."""
    z0, figures = reference_point(model, objective, policy, reference, batch)
    policy_logps, reference_logps = _logps_by_microbatch(model, policy, reference, batch.matched, batch.num_matched)
    losses = objective.loss(policy_logps, reference_logps, batch.desirable, z0)
    weighted = jnp.where(batch.matched.filled, losses * batch.weights, 0)
    return figures | {"loss_sum": jnp.sum(weighted)}, objective.beta * (policy_logps - reference_logps)


def jit_train_step(
    model: Model, objective: Objective, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, FeedbackBatch], tuple[TrainState, Figures]]:
    """The compiled step; it takes over the state's memory."""

    def step(state: TrainState, batch: FeedbackBatch) -> tuple[TrainState, Figures]:
        return train_step(model, objective, optimizer, schedule, state, batch)

    return jax.jit(step, donate_argnums=0)


def jit_evaluation_step(
    model: Model, objective: Objective
) -> Callable[[Params, Params, FeedbackBatch], tuple[Figures, jax.Array]]:
    """The compiled evaluation step."""

    def step(policy: Params, reference: Params, batch: FeedbackBatch) -> tuple[Figures, jax.Array]:
        return evaluation_step(model, objective, policy, reference, batch)

    return jax.jit(step)
