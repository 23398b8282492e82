"""Forward passes over packed rows: log-probabilities, rewards and values of completions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kto_jax.losses import humanline_clamp, segment_sums
from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.model import Model, Params
from kto_jax.objectives import Objective
from kto_jax.shapes import Completions, LabelledRows, PackedRows, RouterSums, TokenScores


def completion_states(model: Model, params: Params, rows: PackedRows, *, offset: int = 0) -> Float[Array, "R C D"]:
    """Hidden states before the completion's tokens, which predict them; with an offset of 1, those at the tokens."""
    return routed_states(model, params, rows, offset=offset)[0]


def routed_states(
    model: Model, params: Params, rows: PackedRows, *, offset: int = 0
) -> tuple[Float[Array, "R C D"], RouterSums | None]:
    """`completion_states`, and for a mixture of experts what its routers did with the rows."""
    hidden_RLD, routed = model.route(params, rows.tokens, rows.segment_ids, rows.positions)
    hidden_RCD = jnp.take_along_axis(hidden_RLD, (rows.predictors + offset)[..., None], axis=1)
    return model.layout.constrain(hidden_RCD, ("rows", "length", "embed")), routed


def _slot_sums(values_RC: Float[Array, "R C"], rows: PackedRows) -> Float[Array, "R S"]:
    num_slots = rows.filled.shape[-1]
    return jax.vmap(lambda values, ids: segment_sums(values, ids - 1, num_slots, where=ids > 0))(
        values_RC, rows.target_segments
    )


def packed_logps(model: Model, params: Params, rows: PackedRows) -> Float[Array, "R S"]:
    """Log-probability of the completion in each slot of one microbatch, in nats; 0 in empty slots."""
    return _slot_sums(model.token_logps(params, completion_states(model, params, rows), rows.targets), rows)


def token_values(
    model: Model, params: Params, rows: PackedRows, hidden_RCD: Float[Array, "R C D"]
) -> Float[Array, "R C"]:
    """The value before each token of the completions, by the value head.

    Args:
      model: with a value head.
      params: its parameters.
      rows: one microbatch.
      hidden_RCD: what the head reads: hidden states of the policy. If it has a trunk of its own, that of the trunk is
        read instead.
    """
    if model.value_tower:
        hidden_RCD = completion_states(model, params[SCALAR_HEAD][TOWER], rows)
    return model.apply_scalar_head(params, hidden_RCD)


def packed_rewards(model: Model, params: Params, rows: PackedRows) -> Float[Array, "R S"]:
    """Reward of the completion in each slot: the reward head on its last token's hidden state; 0 in empty slots."""
    return _last_rewards(model, params, completion_states(model, params, rows, offset=1), rows)


def _last_rewards(model: Model, params: Params, hidden_RCD: Array, rows: PackedRows) -> Float[Array, "R S"]:
    rewards_RC = model.apply_scalar_head(params, hidden_RCD)
    segments = rows.target_segments
    is_last = segments != jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return _slot_sums(jnp.where(is_last, rewards_RC, 0), rows)


def read_completions(
    model: Model,
    objective: Objective,
    policy: Params,
    reference: Params,
    labelled: LabelledRows,
    *,
    key: Key[Array, ""] | None = None,
) -> Completions:
    """The objective's inputs for one microbatch.

    Args:
      model: the policy.
      objective: decides what is computed.
      policy: the trained parameters, the only ones with gradients.
      reference: the frozen parameters. They are not used if `labelled` holds the reference's log-probabilities;
        humanline and value heads need per-token log-probabilities, and therefore the reference.
      labelled: the rows of the microbatch.
      key: PRNG key of the adapters' dropout; None for none.
    """
    rows, reference_logps = labelled.rows, labelled.reference_logps
    desirable, scores = labelled.desirable, labelled.scores
    policy = model.merge_adapters(policy, reference, key)
    lengths = _slot_sums(jnp.ones(rows.targets.shape, jnp.promote_types(model.dtype, jnp.float32)), rows)
    if objective.scalar_head == "reward":
        hidden_RCD, routed = routed_states(model, policy, rows, offset=1)
        rewards, none = _last_rewards(model, policy, hidden_RCD, rows), jnp.zeros(rows.filled.shape, lengths.dtype)
        return Completions(rewards, none, rewards, lengths, desirable, scores, rows.filled, routed=routed)
    hidden_RCD, routed = routed_states(model, policy, rows)
    policy_RC = model.token_logps(policy, hidden_RCD, rows.targets)
    likelihood = _slot_sums(policy_RC, rows)
    reference_RC = jnp.zeros_like(policy_RC)
    if labelled.sampled is not None:
        reference_RC = labelled.sampled.old_logps.astype(policy_RC.dtype)
    elif objective.uses_reference and reference_logps is None:
        reference_RC = model.token_logps(reference, completion_states(model, reference, rows), rows.targets)
    if objective.humanline:
        low, high = objective.humanline
        policy_RC = reference_RC + humanline_clamp(policy_RC - reference_RC, low=low, high=high)
    tokens = None
    if objective.reads_tokens or objective.scalar_head == "value":
        values_RC = jnp.zeros_like(policy_RC)
        if objective.scalar_head == "value":
            detached = jax.lax.stop_gradient(hidden_RCD) if objective.value_detached else hidden_RCD
            values_RC = token_values(model, policy, rows, detached)
        tokens = TokenScores(policy_RC, reference_RC, values_RC, rows.target_segments, labelled.sampled)
    return Completions(
        policy=_slot_sums(policy_RC, rows),
        reference=_slot_sums(reference_RC, rows) if reference_logps is None else reference_logps,
        likelihood=likelihood,
        lengths=lengths,
        desirable=desirable,
        scores=scores,
        filled=rows.filled,
        tokens=tokens,
        routed=routed,
    )
