"""Runs a mixture of experts over the mesh.

Each device holds the experts of its place on the mesh axis "expert", and the rows of its place on data, fsdp and
expert. It gathers the tokens of the devices along the expert axis, passes them through its own experts, and the outputs
are summed and scattered back (all-gather and reduce-scatter). The exchange has one size however the router chooses, so
no token is dropped and no shape depends on the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kto_jax.devices.sharding import ACTIVATION_RULES, PARAMETER_RULES, num_parts
from kto_jax.models.dispatch import Matrices, run_experts, run_experts_of_rows
from kto_jax.models.lora import AdaptedMatrix, Adapter

_ROWS, _LENGTH = (ACTIVATION_RULES[axis] for axis in ("rows", "length"))
_EXPERT, _MLP = (PARAMETER_RULES[axis] for axis in ("experts", "mlp"))


@dataclasses.dataclass(frozen=True)
class MeshExperts:
    """`run_experts_of_rows` over a mesh.

    Attributes:
      mesh: the devices; rows are sharded over data, fsdp and expert, their tokens over sequence, experts over expert,
        and their feed-forward width over tensor.
    """

    mesh: Mesh

    def __call__(
        self, x_RLD: Array, chosen_RLK: Array, shares_RLK: Array, matrices: Matrices, activation: Callable
    ) -> Array:
        """Each token's sum over its experts [R, L, D]."""
        if self.mesh.size == 1:
            return run_experts_of_rows(x_RLD, chosen_RLK, shares_RLK, matrices, activation)
        num_experts = jax.tree.leaves(matrices["gate"])[0].shape[0]
        rows, length = x_RLD.shape[:2]
        # If the devices cannot share rows and tokens equally, padding is added, which no expert multiplies.
        spare = ((0, -rows % num_parts(self.mesh, _ROWS)), (0, -length % num_parts(self.mesh, _LENGTH)), (0, 0))
        x_RLD, shares_RLK = jnp.pad(x_RLD, spare), jnp.pad(shares_RLK, spare)
        chosen_RLK = jnp.pad(chosen_RLK, spare, constant_values=num_experts)

        def run(x_RLD: Array, chosen_RLK: Array, shares_RLK: Array, matrices: dict[str, Any]) -> Array:
            flat = (x.reshape(-1, x.shape[-1]) for x in (x_RLD, chosen_RLK, shares_RLK))
            x_TD, chosen_TK, shares_TK = (jax.lax.all_gather(x, _EXPERT, tiled=True) for x in flat)
            own = num_experts // self.mesh.shape["expert"]
            local_TK = chosen_TK - own * jax.lax.axis_index(_EXPERT)
            local_TK = jnp.where((local_TK >= 0) & (local_TK < own), local_TK, own)
            out_TD = jax.lax.psum(run_experts(x_TD, local_TK, shares_TK, matrices, activation), _MLP)
            return jax.lax.psum_scatter(out_TD, _EXPERT, scatter_dimension=0, tiled=True).reshape(x_RLD.shape)

        tokens = PartitionSpec(_ROWS, _LENGTH, None)
        specs = {name: _spec(name, matrix) for name, matrix in matrices.items()}
        run = jax.shard_map(
            run, mesh=self.mesh, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, check_vma=False
        )
        return run(x_RLD, chosen_RLK, shares_RLK, dict(matrices))[:rows, :length]


def _spec(name: str, matrix: Any) -> Any:
    """The sharding of a matrix of all experts, [E, in, out], or of each array of an adapted one."""
    size_in, size_out = (_MLP, None) if name == "down" else (None, _MLP)
    whole = PartitionSpec(_EXPERT, size_in, size_out)
    if not isinstance(matrix, AdaptedMatrix):
        return whole
    factors = Adapter(PartitionSpec(_EXPERT, size_in, None), PartitionSpec(_EXPERT, None, size_out))
    return AdaptedMatrix(whole, factors, matrix.scale)
