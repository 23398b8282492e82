"""The reward model's loss: the Bradley-Terry model of which of two completions people prefer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.losses.halo import at_least_float32


def bradley_terry_loss(
    chosen_rewards: Float[Array, "*B"],
    rejected_rewards: Float[Array, "*B"],
    *,
    margin: float | Float[Array, "*B"] = 0.0,
    centring: float = 0.0,
) -> Float[Array, "*B"]:
    """Negative log-likelihood of each preference, `−log σ(r_w − r_l − margin) + centring · (r_w + r_l)²`.

    Adding any h(x) to both rewards of a prompt does not change the first term; centring removes that freedom.

    >>> round(float(bradley_terry_loss(jnp.array([3.0]), jnp.array([3.0]))[0]), 4)
    0.6931

    Args:
      chosen_rewards: r of the chosen completion, without unit.
      rejected_rewards: r of the rejected completion.
      margin: by how much the chosen reward should exceed the rejected one; one number, or one per pair, for example
        from annotators' grades.
      centring: pulls the two rewards of a pair to opposite values.

    Returns:
      One loss per pair; the reduction is the caller's.

    Source: Ouyang et al., arXiv 2203.02155; margin: arXiv 2307.09288; centring: arXiv 2312.09244.
    """
    chosen, rejected = at_least_float32(chosen_rewards), at_least_float32(rejected_rewards)
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centring * jnp.square(chosen + rejected)
