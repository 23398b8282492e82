"""Losses of the routers of a mixture of experts: they keep its experts in use and its logits small."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def balance_loss(
    counts: Float[Array, " E"], probabilities: Float[Array, " E"], num_tokens: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The load-balancing loss E Σ_e f_e P_e; K, the experts per token, if all experts get equally many tokens.

    f_e is the share of tokens that chose expert e, and P_e the mean of its probability. f has no gradient. The loss is
    linear in P, so that the sums of a part of the tokens give that part's share of the loss.

    Args:
      counts: how many tokens chose each expert.
      probabilities: sum over the tokens of each expert's probability.
      num_tokens: the number of all tokens.

    Returns:
      The loss.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6. As in transformers, f sums to K, and the tokens of
    all layers are counted together.

    >>> import jax.numpy as jnp
    >>> float(balance_loss(jnp.array([2.0, 2.0]), jnp.array([1.0, 1.0]), 2.0))
    2.0
    """
    return len(counts) * jnp.sum(counts / num_tokens * (probabilities / num_tokens))


def z_loss(squared_normalizers: Float[Array, ""], num_tokens: Float[Array, ""] | float) -> Float[Array, ""]:
    """The router z-loss: the mean over tokens of (log Σ_e exp logit_e)², which keeps the logits small.

    Args:
      squared_normalizers: sum over the tokens of the squared log-sum-exp of the router's logits.
      num_tokens: the number of all tokens.

    Returns:
      The loss.

    Source: ST-MoE (arXiv 2202.08906), equation 5.

    >>> import jax.numpy as jnp
    >>> float(z_loss(jnp.array(8.0), 2.0))
    4.0
    """
    return squared_normalizers / num_tokens
