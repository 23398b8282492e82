"""One training step: log-probabilities, the reference point of the whole batch, gradients, the update.

The first pass, without gradient, evaluates the rows of the objective's reference point (for KTO the unmatched pairs)
over all microbatches and computes one z0. The second pass accumulates the gradient over microbatches. Sums are divided
once, by the count of the whole batch, so the numbers do not depend on devices or microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from kto_jax.config import Config, ReferenceConfig
from kto_jax.models.model import Model, Params
from kto_jax.objectives import Objective
from kto_jax.shapes import Completions, FeedbackBatch, LabelledRows
from kto_jax.training import metrics
from kto_jax.training.accumulate import accumulate_gradient
from kto_jax.training.flops import tokens_and_flops
from kto_jax.training.forward import read_completions
from kto_jax.training.microbatches import map_microbatches
from kto_jax.training.optimizer import make_learning_rate, make_optimizer, num_updates
from kto_jax.training.routers import (
    NO_ROUTERS,
    RouterWeights,
    count_choices,
    num_routed_tokens,
    router_loss,
    router_metrics,
    router_weights,
)
from kto_jax.training.state import TrainState
from kto_jax.training.sync import sync_reference

Metrics = dict[str, Float[Array, ""]]
Tree = TypeVar("Tree")
_NO_SYNC = ReferenceConfig(sync_every=0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of a step, apart from the state and the batch.

    Attributes:
      model: the policy; the reference has the same architecture.
      objective: the objective to minimise.
      optimizer: updates the policy.
      learning_rate: the optimizer's schedule, by number of updates.
      sync: when the reference is synced.
      router: weights of the routers' losses of a mixture of experts.
      seed: of the adapters' dropout.
    """

    model: Model
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    sync: ReferenceConfig = _NO_SYNC
    router: RouterWeights = NO_ROUTERS
    seed: int = 0


def make_recipe(config: Config, objective: Objective, model: Model, num_steps: int) -> Recipe:
    """The recipe of a run's steps, for training, planning and benchmarks.

    Args:
      config: the run.
      objective: the objective to minimise.
      model: the policy.
      num_steps: number of steps of the run, for the learning-rate schedule.

    Raises:
      ConfigError: weights of the routers' losses are set for a model without experts.
    """
    router = router_weights(config, model.config)
    learning_rate = make_learning_rate(config.optimizer, num_steps)
    optimizer = make_optimizer(
        config.optimizer,
        learning_rate,
        value_head=model.scalar_head == "value",
        param_dtype=config.model.param_dtype,
        seed=config.seed,
    )
    return Recipe(model, objective, optimizer, learning_rate, config.reference, router, config.seed)


def _without_tokens(completions: Completions, objective: Objective | None = None) -> Completions:
    """The completions without per-token quantities, but with the objective's figures of them."""
    figures = objective.figures(completions) if objective and objective.figures else None
    return dataclasses.replace(completions, tokens=None, figures=figures)


def _run_after(earlier: Iterable[Array], tree: Tree) -> Tree:
    """Returns `tree` unchanged, but on CPU data-dependent on `earlier`, so that XLA cannot run its consumers first.

    CPU devices share a thread pool: if some are in a collective over the batch while others are in a loop with other
    collectives, they deadlock. An optimization barrier is not enough, because XLA on CPU deletes it before scheduling.
    TPU and GPU run a program's operations in the same order on all devices and need no dependency.
    """

    def tie(earlier: list[Array], tree: Tree) -> Tree:
        zero = jnp.minimum(sum(jnp.isfinite(jnp.ravel(x)[0]).astype(jnp.int32) for x in earlier), 0)

        def one(leaf: Array) -> Array:
            if leaf.dtype == jnp.bool_:
                return leaf & (zero == 0)
            return leaf + zero if leaf.dtype == jnp.int32 else leaf

        return jax.tree.map(one, tree)

    return jax.lax.platform_dependent(list(earlier), tree, cpu=tie, default=lambda earlier, tree: tree)


# ------------------------------------------------------------------------------------------------ the two passes


def _matched(batch: FeedbackBatch) -> LabelledRows:
    return LabelledRows(batch.matched, batch.desirable, batch.scores, batch.matched_reference, batch.sampled)


def _unmatched(batch: FeedbackBatch) -> LabelledRows:
    """The unmatched rows, whose completions have no label of their own."""
    filled = batch.unmatched.filled
    return LabelledRows(batch.unmatched, jnp.zeros_like(filled), jnp.zeros(filled.shape), batch.unmatched_reference)


def map_completions(
    model: Model, objective: Objective, state: TrainState, rows: LabelledRows, count: Array
) -> Completions:
    """The completions of the rows' first `count` microbatches, without gradient: [M, R, S]."""

    def read(one: LabelledRows) -> Completions:
        completions = read_completions(model, objective, state.policy, state.reference, one)
        return dataclasses.replace(_without_tokens(completions), routed=None)

    return map_microbatches(read, rows, count)


def reference_point(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch
) -> tuple[Float[Array, ""] | Float[Array, "M R S"], Metrics, FeedbackBatch]:
    """The reference point of the global batch, its metrics, and the batch for the second pass.

    Returns:
      The objective's reference point: for KTO z0 in nats. Metrics: z0 (its mean over the examples) if there is a first
      pass; for unmatched rows also kl (the unclamped mean log-ratio), kl_standard_error and num_unmatched. The batch,
      unchanged; whatever reads it runs after the metrics (see `_run_after`).
    """
    point, figures = _first_pass(model, objective, state, batch)
    return point, figures, _run_after([point, *figures.values()], batch)


def _first_pass(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch
) -> tuple[Float[Array, ""] | Float[Array, "M R S"], Metrics]:
    if objective.first_pass == "none":
        return jnp.zeros((), jnp.promote_types(model.dtype, jnp.float32)), {}
    if objective.first_pass == "unmatched":
        rows, count = _unmatched(batch), batch.num_unmatched
    else:
        rows, count = _matched(batch), batch.num_matched
    completions = map_completions(model, objective, state, rows, count)
    point = objective.reference_point(completions)
    filled = _run_after([point], rows.rows.filled)
    if objective.first_pass == "matched":
        return point, {"z0": metrics.mean(jnp.broadcast_to(point, filled.shape), filled)}
    figures = {"z0": point, "num_unmatched": jnp.sum(filled).astype(point.dtype)}
    if objective.uses_reference:
        log_ratios = completions.policy - completions.reference
        figures |= {
            "kl": metrics.mean(log_ratios, filled),
            "kl_standard_error": metrics.standard_error(log_ratios, filled),
        }
    return point, figures


def _loss_of(
    model: Model, objective: Objective, state: TrainState, point: Array, key: Key[Array, ""] | None = None
) -> Callable[[Params, tuple[LabelledRows, Array, Array]], tuple[Completions, Float[Array, ""]]]:
    """The function (policy, matched microbatch) -> its completions, and Σ weight · loss of its examples.

    `key` is that of the adapters' dropout in this step; None for none.
    """

    def loss_sum(policy: Params, one: tuple[LabelledRows, Array, Array]) -> tuple[Completions, Float[Array, ""]]:
        rows, weights, index = one
        own = None if key is None else jax.random.fold_in(key, index)
        completions = read_completions(model, objective, policy, state.reference, rows, key=own)
        losses = objective.loss(completions, point[index] if point.ndim else point, state.objective_state)
        counts = objective.counts(rows.rows.filled, rows.desirable)
        return completions, jnp.sum(jnp.where(counts, losses * weights, 0))

    return loss_sum


def _matched_microbatches(batch: FeedbackBatch) -> tuple[LabelledRows, Array, Array]:
    """The matched rows, the weights of their examples and the index of each microbatch."""
    return _matched(batch), batch.weights, jnp.arange(batch.weights.shape[0])


def loss_and_gradient(
    model: Model,
    objective: Objective,
    state: TrainState,
    batch: FeedbackBatch,
    point: Array,
    router: RouterWeights = NO_ROUTERS,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Params, Completions]:
    """Weighted mean loss over the examples of the global batch, its gradient, and the completions [M, R, S].

    The loss is Σ weight · loss / number of examples: a weight of 2 counts an example twice. For objectives whose mean
    is over tokens, it is divided by the number of completion tokens instead. The losses of routers are added.
    """
    counts_E, batch = _chosen_experts(model, router, state, batch)
    counted = objective.counts(batch.matched.filled, batch.desirable)
    if objective.mean_over == "tokens":
        counted = batch.matched.target_segments > 0
    divisor = jnp.maximum(jnp.sum(counted), 1)
    num_tokens = num_routed_tokens(model, _run_after([divisor], batch).matched)
    loss_sum = _loss_of(model, objective, state, point, key)

    def share_of_loss(policy: Params, one: tuple[LabelledRows, Array, Array]) -> tuple[jax.Array, Completions]:
        completions, loss = loss_sum(policy, one)
        loss = loss / divisor
        if completions.routed is not None and router != NO_ROUTERS:
            loss = loss + router_loss(router, completions.routed, counts_E, num_tokens)
        return loss, _without_tokens(completions, objective)

    return accumulate_gradient(share_of_loss, state.policy, _matched_microbatches(batch), batch.num_matched)


def _chosen_experts(
    model: Model, router: RouterWeights, state: TrainState, batch: FeedbackBatch
) -> tuple[Float[Array, " E"], FeedbackBatch]:
    """How many tokens of the matched rows choose each expert, if a loss reads it, else 0; and the batch, unchanged."""
    if not router.balance:
        return jnp.zeros(model.config.num_experts, jnp.promote_types(model.dtype, jnp.float32)), batch
    policy = model.merge_adapters(state.policy, state.reference)
    counts_E = count_choices(model, policy, batch.matched, batch.num_matched)
    return counts_E, _run_after([counts_E], batch)


# ------------------------------------------------------------------------------------------------ steps


def _update(
    recipe: Recipe, state: TrainState, gradient: Params, rewards: Array, filled: Array, finite: Array
) -> TrainState:
    """The next state; policy, optimizer state and objective state change only if loss and gradient are finite."""

    def apply(policy: Params, opt_state: Any, objective_state: Mapping[str, Array]) -> tuple:
        updates, opt_state = recipe.optimizer.update(gradient, opt_state, policy)
        next_objective_state = recipe.objective.next_state(objective_state, rewards, filled)
        return optax.apply_updates(policy, updates), opt_state, next_objective_state

    # A branch, not a `jnp.where` of old and new arrays, for which XLA on CPU copies both moments.
    old = (state.policy, state.opt_state, state.objective_state)
    policy, opt_state, objective_state = jax.lax.cond(finite, apply, lambda *unchanged: unchanged, *old)
    return TrainState(
        step=state.step + 1,
        policy=policy,
        reference=state.reference,
        opt_state=opt_state,
        objective_state=objective_state,
        num_bad_steps=jnp.where(finite, 0, state.num_bad_steps + 1),
    )


def train_step(recipe: Recipe, state: TrainState, batch: FeedbackBatch) -> tuple[TrainState, Metrics]:
    """One step: syncs the reference if it is due, then updates the policy.

    The reference is synced at the start, so that between steps the state holds the reference that the policy was
    trained against. A non-finite loss or gradient leaves policy, optimizer state and objective state unchanged, and is
    counted.

    Returns:
      The next state, and the metrics that docs/metrics.md explains.
    """
    model, objective = recipe.model, recipe.objective
    state = dataclasses.replace(state, reference=sync_reference(state.reference, state.policy, state.step, recipe.sync))
    point, figures, batch = reference_point(model, objective, state, batch)
    drops = model.lora is not None and model.lora.dropout > 0
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step) if drops else None
    loss, gradient, completions = loss_and_gradient(model, objective, state, batch, point, recipe.router, key)
    batch = _run_after([loss], batch)
    grad_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    next_state = _update(recipe, state, gradient, objective.rewards(completions), batch.matched.filled, finite)
    figures |= metrics.reward_metrics(
        objective, completions, batch, objective.reference_reward(point, state.objective_state)
    )
    if completions.figures is not None:
        num_tokens = jnp.maximum(jnp.sum(batch.matched.target_segments > 0), 1)
        figures |= {name: jnp.sum(sums) / num_tokens for name, sums in completions.figures.items()}
    figures |= {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": recipe.learning_rate(num_updates(state.opt_state, state.step)),
        "num_bad_steps": next_state.num_bad_steps,
        "examples": jnp.sum(objective.counts(batch.matched.filled, batch.desirable)),
        **next_state.objective_state,
    }
    if completions.routed is not None:
        num_tokens = num_routed_tokens(model, batch.matched)
        figures |= router_metrics(model, recipe.router, completions.routed, num_tokens)
    return next_state, figures | tokens_and_flops(model, objective, batch)


def evaluation_step(
    model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch
) -> tuple[Metrics, Float[Array, "M R S"], Float[Array, "M R S"]]:
    """Loss and z0 of one held-out batch; the rewards of its slots and their gains, for metrics over all batches.

    A gain is a reward less the reward of the reference point; its sign is the prediction of a thumb.
    """
    point, figures, batch = reference_point(model, objective, state, batch)
    loss_sum = _loss_of(model, objective, state, point)

    def measure(one: tuple[LabelledRows, Array, Array]) -> tuple[Array, Array]:
        completions, loss = loss_sum(state.policy, one)
        return loss, objective.rewards(completions)

    losses, rewards = map_microbatches(measure, _matched_microbatches(batch), batch.num_matched)
    gains = rewards - objective.reference_reward(point, state.objective_state)
    return figures | {"loss_sum": jnp.sum(losses)}, rewards, gains


def reference_error(model: Model, objective: Objective, state: TrainState, batch: FeedbackBatch) -> Metrics:
    """The effect of rounding a reference that started as the policy, on a state before the first step.

    Returns:
      logps_mean, logps_max: absolute error of the log-probabilities of the batch's completions, in nats. rewards_mean,
      rewards_max: of the rewards, which would all be 0. completions: their number.
    """
    completions, filled = (
        map_completions(model, objective, state, _matched(batch), batch.num_matched),
        batch.matched.filled,
    )
    # Not the policy's log-probabilities, which humanline clamps.
    errors = {"logps": completions.likelihood - completions.reference, "rewards": objective.rewards(completions)}
    figures = {"completions": jnp.sum(filled).astype(completions.policy.dtype)}
    for name, error in errors.items():
        size = jnp.where(filled, jnp.abs(error), 0)
        figures |= {f"{name}_mean": metrics.mean(size, filled), f"{name}_max": jnp.max(size)}
    return figures


def jit_train_step(recipe: Recipe) -> Callable[[TrainState, FeedbackBatch], tuple[TrainState, Metrics]]:
    """The compiled step; it donates the state's buffers."""

    def step(state: TrainState, batch: FeedbackBatch) -> tuple[TrainState, Metrics]:
        return train_step(recipe, state, batch)

    return jax.jit(step, donate_argnums=0)


def jit_evaluation_step(
    model: Model, objective: Objective
) -> Callable[[TrainState, FeedbackBatch], tuple[Metrics, jax.Array, jax.Array]]:
    """The compiled evaluation step."""

    def step(state: TrainState, batch: FeedbackBatch) -> tuple[Metrics, jax.Array, jax.Array]:
        return evaluation_step(model, objective, state, batch)

    return jax.jit(step)
