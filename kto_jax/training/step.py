"""One training step: log-probabilities, the reference point of the whole batch, gradients, the update.

Pass 1, without gradient, reads what the objective's reference point is made of over all microbatches (for KTO the
unmatched pairs) and makes one z0. Pass 2 takes gradients microbatch by microbatch. Sums are divided once, by the count
of the whole batch, so that neither devices nor microbatches change the numbers. Microbatches have one shape and a
traced count: one program serves every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kto_jax.config import ReferenceConfig
from kto_jax.models.model import Model, Params
from kto_jax.objectives import Objective
from kto_jax.shapes import Completions, FeedbackBatch, PackedRows
from kto_jax.training import metrics
from kto_jax.training.forward import read_completions
from kto_jax.training.rounding import round_reference
from kto_jax.training.state import TrainState

Figures = dict[str, Float[Array, ""]]
Tree = TypeVar("Tree")


def _microbatch(tree: Tree, index: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _room_for(function: Callable[[Int[Array, ""]], Tree], num_microbatches: int) -> Tree:
    """Zeros that hold the results of all microbatches."""
    one = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(lambda leaf: jnp.zeros((num_microbatches, *leaf.shape), leaf.dtype), one)


def _put(results: Tree, index: Int[Array, ""], result: Tree) -> Tree:
    return jax.tree.map(lambda all_of_them, one: all_of_them.at[index].set(one), results, result)


def _sums_alone(completions: Completions) -> Completions:
    return dataclasses.replace(completions, tokens=None)


def _after(earlier: Iterable[Array], tree: Tree) -> Tree:
    """The same tree, whose integers and booleans are not there before `earlier` is.

    XLA on CPU begins what depends on nothing else whenever it likes. Where some devices sum over the batch while others
    are in a loop that they share with those, all wait for each other for ever.
    """
    nothing = jnp.minimum(sum(jnp.isfinite(jnp.ravel(x)[0]).astype(jnp.int32) for x in earlier), 0)

    def tie(leaf: Array) -> Array:
        if leaf.dtype == jnp.bool_:
            return leaf & (nothing == 0)
        return leaf + nothing if leaf.dtype == jnp.int32 else leaf

    return jax.tree.map(tie, tree)


def read_all(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch, rows: PackedRows
) -> Completions:
    """All microbatches of `rows`, which are the batch's matched or unmatched ones, without gradient: [M, R, S]."""
    inputs, count = (rows, batch.desirable, batch.scores, batch.matched_reference), batch.num_matched
    if rows is batch.unmatched:
        no_labels = (jnp.zeros_like(rows.filled), jnp.zeros(rows.filled.shape))
        inputs, count = (rows, *no_labels, batch.unmatched_reference), batch.num_unmatched

    def read(index: Int[Array, ""]) -> Completions:
        return _sums_alone(
            read_completions(model, objective, state.policy, state.reference, *_microbatch(inputs, index))
        )

    def body(index: Int[Array, ""], results: Completions) -> Completions:
        return _put(results, index, read(index))

    return jax.lax.fori_loop(0, count, body, _room_for(read, rows.filled.shape[0]))


# ------------------------------------------------------------------------------------------------ the two passes


def reference_point(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch
) -> tuple[Float[Array, ""] | Float[Array, "M R S"], Figures]:
    """The reference point of the global batch, and what is known about it.

    Returns:
      What the objective makes of its first pass: for KTO z0 in nats. Figures: z0 (its mean over the examples) where
      there is a first pass; of unmatched rows also kl (the unclamped mean log-ratio), kl_standard_error and
      num_unmatched.
    """
    if objective.first_pass == "none":
        return jnp.zeros((), jnp.promote_types(model.dtype, jnp.float32)), {}
    rows = batch.unmatched if objective.first_pass == "unmatched" else batch.matched
    completions = read_all(model, objective, state, batch, rows)
    point = objective.reference_point(completions)
    filled = _after([point], rows.filled)
    if objective.first_pass == "matched":
        return point, {"z0": metrics.mean(jnp.broadcast_to(point, filled.shape), filled)}
    log_ratios = completions.policy - completions.reference
    figures = {
        "z0": point,
        "kl": metrics.mean(log_ratios, filled),
        "kl_standard_error": metrics.standard_error(log_ratios, filled),
        "num_unmatched": jnp.sum(filled).astype(point.dtype),
    }
    if not objective.uses_reference:
        figures = {name: figures[name] for name in ("z0", "num_unmatched")}
    return point, figures


def _loss_sum(
    model: Model,
    objective: Objective,
    policy: Params,
    state: TrainState,
    batch: FeedbackBatch,
    point: Array,
    index: Int[Array, ""],
) -> tuple[Completions, Float[Array, ""]]:
    """The completions of a matched microbatch, and Σ weight · loss of its examples."""
    rows, desirable, scores, reference_logps, weights = _microbatch(
        (batch.matched, batch.desirable, batch.scores, batch.matched_reference, batch.weights), index
    )
    completions = read_completions(model, objective, policy, state.reference, rows, desirable, scores, reference_logps)
    losses = objective.loss(completions, point[index] if point.ndim else point, state.objective_state)
    return completions, jnp.sum(jnp.where(objective.counts(rows.filled, desirable), losses * weights, 0))


def _add_gradient(total: Any, params: Params, backward: Any, cotangent: jax.Array) -> None:
    """Runs the backward pass into references to arrays, `total`; a narrower parameter's gradient is widened first."""
    ad: Any = jax.ad
    in_place = jax.tree.map(lambda ref, leaf: ref if ref.dtype == leaf.dtype else ad.GradValue(), total, params)
    (gradient,) = backward.with_refs(in_place)(cotangent)

    def add(ref: Any, new: Any) -> None:
        if not isinstance(new, ad.GradRef):
            jax.ref.addupdate(ref, ..., new.astype(ref.dtype))

    jax.tree.map(add, total, gradient)


def loss_and_gradient(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch, point: Array
) -> tuple[Float[Array, ""], Params, Completions]:
    """Weighted mean loss over the examples of the global batch, its gradient, and the completions [M, R, S].

    The loss is Σ weight · loss / number of examples: a weight of 2 counts an example twice.
    """
    num_examples = jnp.maximum(jnp.sum(objective.counts(batch.matched.filled, batch.desirable)), 1)
    dtype = jnp.promote_types(model.dtype, jnp.float32)

    def share_of_loss(params: Params, index: Int[Array, ""]) -> tuple[jax.Array, Completions]:
        completions, loss = _loss_sum(model, objective, params, state, batch, point, index)
        return loss / num_examples, _sums_alone(completions)

    # The backward pass adds to it in place, layer by layer: a microbatch has no gradient of its own.
    gradient = jax.tree.map(
        lambda leaf: jax.new_ref(jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))), state.policy
    )

    def body(index: Int[Array, ""], carry: tuple[jax.Array, Completions]) -> tuple[jax.Array, Completions]:
        loss, completions = carry
        part, backward, read = jax.vjp(lambda params: share_of_loss(params, index), state.policy, has_aux=True)
        _add_gradient(gradient, state.policy, backward, jnp.ones_like(part))
        return loss + part, _put(completions, index, read)

    room = _room_for(lambda index: share_of_loss(state.policy, index)[1], batch.matched.filled.shape[0])
    loss, completions = jax.lax.fori_loop(0, batch.num_matched, body, (jnp.zeros((), dtype), room))
    return loss, jax.tree.map(jax.ref.freeze, gradient), completions


# ------------------------------------------------------------------------------------------------ figures


def _figures(
    objective: Objective, completions: Completions, batch: FeedbackBatch, point: Array, state: Mapping[str, Array]
) -> Figures:
    rewards, filled = objective.rewards(completions), batch.matched.filled
    flat = (rewards.reshape(-1), batch.desirable.reshape(-1), filled.reshape(-1))
    if objective.reads == "desirable":
        return {"rewards_desirable": metrics.mean(rewards, filled)}
    figures = metrics.class_figures(*flat)
    if objective.reads == "pairs":
        return figures | {"accuracy": metrics.pair_accuracy(rewards, filled)}
    if objective.reads == "thumbs" and objective.uses_reference:
        gains = rewards - objective.reference_reward(point, state)
        figures |= {"accuracy": metrics.accuracy(gains.reshape(-1), *flat[1:])}
        if objective.saturates:
            figures |= {"saturated": metrics.saturated(gains.reshape(-1), flat[2])}
    return figures


def work(model: Model, objective: Objective, batch: FeedbackBatch) -> Figures:
    """What the step has to do for a batch, whatever it does besides: the numerators of tokens/s and MFU.

    Returns:
      tokens: real tokens of the matched rows. flops, at real tokens: the policy's forward and backward pass over the
      matched rows, and the forward passes of the reference (where the step reads it) and of the first pass. Adapters
      spare the backward pass the gradients of the matrices; their own work is not counted.
    """
    has_logits = objective.scorer != "reward"

    def forward(rows: PackedRows) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens, and the operations of products with weights and of attention."""
        real = rows.segment_ids > 0
        tokens = jnp.sum(real).astype(jnp.float32)
        seen = jnp.where(real, rows.positions + 1, 0)
        attended = jnp.sum(seen.astype(jnp.float32))
        completions = jnp.sum(rows.target_segments > 0).astype(jnp.float32)
        body = model.config.flops_per_token(attended=0, head=False)
        head = model.config.flops_per_token(attended=0, head=True) - body
        attention = model.config.flops_per_token(attended=1, attended_locally=0, head=False) - body
        attending = attention * attended
        if model.config.window is not None:
            local = model.config.flops_per_token(attended=0, attended_locally=1, head=False) - body
            attending += local * jnp.sum(jnp.minimum(seen, model.config.window).astype(jnp.float32))
        return tokens, body * tokens + has_logits * head * completions, attending

    tokens, products, attending = forward(batch.matched)
    matched = products + attending
    backward = (1 if model.adapter_scale else 2) * products + 2 * attending
    models = 2 if objective.uses_reference and batch.matched_reference is None else 1
    zero = jnp.zeros_like(matched)
    first = {"none": zero, "unmatched": sum(forward(batch.unmatched)[1:]), "matched": matched}[objective.first_pass]
    return {"tokens": tokens, "flops": models * matched + backward + models * first}


# ------------------------------------------------------------------------------------------------ steps


def train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    sync: ReferenceConfig,
    state: TrainState,
    batch: FeedbackBatch,
) -> tuple[TrainState, Figures]:
    """One step: a synced reference moves where it is due, then the policy.

    The reference moves at the start, so that whoever measures or saves the state between steps sees the policy beside
    the reference that it was trained against. A loss or gradient that is not finite leaves policy, optimizer and
    objective as they were, and is counted.

    Returns:
      The next state, and the figures that docs/metrics.md explains.
    """
    state = dataclasses.replace(state, reference=_synced(state.reference, state.policy, state.step, sync))
    point, figures = reference_point(model, objective, state, batch)
    batch = _after([point, *figures.values()], batch)
    loss, gradient, completions = loss_and_gradient(model, objective, state, batch, point)
    batch = _after([loss], batch)
    grad_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def move(policy: Params, opt_state: Any, objective_state: Mapping[str, Array]) -> tuple:
        updates, opt_state = optimizer.update(gradient, opt_state, policy)
        rewards = objective.rewards(completions)
        return (
            optax.apply_updates(policy, updates),
            opt_state,
            objective.next_state(objective_state, rewards, batch.matched.filled),
        )

    # A branch, not a choice between old and new arrays, for which XLA on CPU copies both moments.
    moved = (state.policy, state.opt_state, state.objective_state)
    policy, opt_state, objective_state = jax.lax.cond(finite, move, lambda *kept: kept, *moved)
    next_state = TrainState(
        step=state.step + 1,
        policy=policy,
        reference=state.reference,
        opt_state=opt_state,
        objective_state=objective_state,
        num_bad_steps=jnp.where(finite, 0, state.num_bad_steps + 1),
    )
    figures |= _figures(objective, completions, batch, point, state.objective_state) | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate(state.step),
        "num_bad_steps": next_state.num_bad_steps,
        "examples": jnp.sum(objective.counts(batch.matched.filled, batch.desirable)),
        **next_state.objective_state,
    }
    return next_state, figures | work(model, objective, batch)


def _synced(reference: Params, policy: Params, step: Int[Array, ""], sync: ReferenceConfig) -> Params:
    """The reference, moved towards the policy after every so many steps: mix · policy + (1 − mix) · reference."""
    if not sync.sync_every or not reference:
        return reference

    def mix(old: Params) -> Params:
        def one(r: Array, p: Array) -> Array:
            wide = jnp.promote_types(p.dtype, jnp.float32)
            return sync.sync_mix * p.astype(wide) + (1 - sync.sync_mix) * r.astype(wide)

        mixed = jax.tree.map(
            one,
            old,
            {name: policy[name] for name in old},  # without a value head
        )
        if sync.sync_mix == 1:  # Nothing of the old is kept, whose moves could be lost.
            return jax.tree.map(lambda x, r: x.astype(r.dtype), mixed, old)
        return round_reference(mixed, old, step)

    return jax.lax.cond((step > 0) & (step % sync.sync_every == 0), mix, lambda old: old, reference)


def evaluation_step(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch
) -> tuple[Figures, Float[Array, "M R S"]]:
    """Loss and z0 of one held-out batch, and the rewards of its slots, for figures over all of them."""
    point, figures = reference_point(model, objective, state, batch)
    batch = _after([point, *figures.values()], batch)

    def body(index: Int[Array, ""], carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        completions, loss = _loss_sum(model, objective, state.policy, state, batch, point, index)
        return carry[0] + loss, carry[1].at[index].set(objective.rewards(completions))

    dtype = jnp.promote_types(model.dtype, jnp.float32)
    room = (jnp.zeros((), dtype), jnp.zeros(batch.matched.filled.shape, dtype))
    loss_sum, rewards = jax.lax.fori_loop(0, batch.num_matched, body, room)
    return figures | {"loss_sum": loss_sum}, rewards


def reference_error(model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch) -> Figures:
    """What rounding did to a reference that began as the policy, of a state whose policy is still what it began as.

    Returns:
      logps_mean, logps_max: absolute error of the log-probabilities of the batch's completions, in nats. rewards_mean,
      rewards_max: of the rewards, which would all be 0. completions: how many there are.
    """
    completions, filled = read_all(model, objective, state, batch, batch.matched), batch.matched.filled
    # Not the policy's log-probabilities, which humanline clamps.
    errors = {"logps": completions.likelihood - completions.reference, "rewards": objective.rewards(completions)}
    figures = {"completions": jnp.sum(filled).astype(completions.policy.dtype)}
    for name, error in errors.items():
        size = jnp.where(filled, jnp.abs(error), 0)
        figures |= {f"{name}_mean": metrics.mean(size, filled), f"{name}_max": jnp.max(size)}
    return figures


def jit_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    sync: ReferenceConfig,
) -> Callable[[TrainState, FeedbackBatch], tuple[TrainState, Figures]]:
    """The compiled step; it takes over the state's memory."""

    def step(state: TrainState, batch: FeedbackBatch) -> tuple[TrainState, Figures]:
        return train_step(model, objective, optimizer, learning_rate, sync, state, batch)

    return jax.jit(step, donate_argnums=0)


def jit_evaluation_step(
    model: Model, objective: Objective
) -> Callable[[TrainState, FeedbackBatch], tuple[Figures, jax.Array]]:
    """The compiled evaluation step."""

    def step(state: TrainState, batch: FeedbackBatch) -> tuple[Figures, jax.Array]:
        return evaluation_step(model, objective, state, batch)

    return jax.jit(step)
