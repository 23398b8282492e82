"""The products of a mixture of experts: each token passes through its own experts, whose outputs are summed.

No token is dropped, however many choose the same expert: the pairs of token and expert are sorted by expert, and each
expert multiplies as many rows as chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.gradients import table_rows
from kto_jax.models.grouped import grouped_product
from kto_jax.models.lora import AdaptedMatrix

Matrices = Mapping[str, Any]
"""The matrices "gate" and "up" [E, D, F] and "down" [E, F, D] of a layer's experts: arrays, or an `AdaptedMatrix`."""


def run_experts(
    x_TD: Float[Array, "T D"],
    chosen_TK: Int[Array, "T K"],
    shares_TK: Float[Array, "T K"],
    matrices: Matrices,
    activation: Callable[[Array], Array],
) -> Float[Array, "T D"]:
    """Σ_k share_k · down(activation(gate(x)) · up(x)), with the matrices of the token's k-th expert.

    Args:
      x_TD: the tokens.
      chosen_TK: the experts of each token; E for none.
      shares_TK: the factor of each expert's output.
      matrices: of the experts.
      activation: of the gate.
    """
    num_experts, per_token = jax.tree.leaves(matrices["gate"])[0].shape[0], chosen_TK.shape[1]
    chosen_M = chosen_TK.reshape(-1)
    order_M = jnp.argsort(chosen_M)
    ends_E = jnp.searchsorted(chosen_M[order_M], jnp.arange(num_experts), side="right")
    sizes_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
    x_MD = table_rows(x_TD, order_M // per_token)
    hidden_MF = activation(_product(x_MD, matrices["gate"], sizes_E)) * _product(x_MD, matrices["up"], sizes_E)
    out_MD = _product(hidden_MF, matrices["down"], sizes_E)
    out_TKD = out_MD.at[jnp.argsort(order_M)].get(unique_indices=True).reshape(*chosen_TK.shape, -1)
    return jnp.sum(out_TKD.astype(shares_TK.dtype) * shares_TK[..., None], axis=1).astype(x_TD.dtype)


def run_experts_of_rows(
    x_RLD: Float[Array, "R L D"],
    chosen_RLK: Int[Array, "R L K"],
    shares_RLK: Float[Array, "R L K"],
    matrices: Matrices,
    activation: Callable[[Array], Array],
) -> Float[Array, "R L D"]:
    """As `run_experts`, for the tokens of packed rows on one device."""
    x_TD, chosen_TK, shares_TK = (x.reshape(-1, x.shape[-1]) for x in (x_RLD, chosen_RLK, shares_RLK))
    return run_experts(x_TD, chosen_TK, shares_TK, matrices, activation).reshape(x_RLD.shape)


def _product(x_MI: Array, matrix: Array | AdaptedMatrix, sizes_E: Array) -> Array:
    if not isinstance(matrix, AdaptedMatrix):
        return grouped_product(x_MI, matrix, sizes_E)
    low_rank = grouped_product(grouped_product(x_MI, matrix.a, sizes_E), matrix.scaled_b, sizes_E)
    return grouped_product(x_MI, matrix.frozen, sizes_E) + low_rank
