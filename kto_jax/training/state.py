"""The training state: everything that a step reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import Any as Array  # Arrays, or jax.ShapeDtypeStruct in an abstract state.

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from kto_jax.models.model import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: steps taken.
      policy: the trained parameters: the policy's, or only its low-rank adapters.
      reference: the frozen parameters: the reference's, which are also the base of adapters; {} if there are none.
      opt_state: the optimizer's state.
      objective_state: the objective's state, by name; usually {}.
      num_bad_steps: consecutive steps with a non-finite loss or gradient. They changed nothing else.
    """

    step: Int[Array, ""]
    policy: Params
    reference: Params
    opt_state: Any
    objective_state: dict[str, Array]
    num_bad_steps: Int[Array, ""]


def create_state(
    policy: Params,
    reference: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective_state: Mapping[str, float],
) -> TrainState:
    """A state at step 0.

    Args:
      policy: placed parameters.
      reference: placed parameters; arrays shared with the policy are copied, because the step donates the policy's
        buffers.
      optimizer: from `make_optimizer`.
      mesh: scalars are replicated over it.
      objective_state: the objective's initial state.
    """
    scalar = NamedSharding(mesh, PartitionSpec())
    reference = without_shared(reference, policy)
    layout = state_shardings(
        jax.eval_shape(optimizer.init, policy), jax.tree.map(lambda leaf: leaf.sharding, policy), mesh
    )
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), scalar),
        policy=policy,
        reference=reference,
        opt_state=jax.jit(optimizer.init, out_shardings=layout)(policy),
        objective_state={
            name: jax.device_put(jnp.asarray(value, _wide()), scalar) for name, value in objective_state.items()
        },
        num_bad_steps=jax.device_put(jnp.zeros((), jnp.int32), scalar),
    )


def without_shared(reference: Params, policy: Params) -> Params:
    """The reference with copies of the arrays that it shares with the policy, whose buffers the step donates."""
    owned = {id(leaf) for leaf in jax.tree.leaves(policy)}
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in owned else leaf, reference)


def _wide() -> jnp.dtype:
    """float32, or float64 if x64 is enabled."""
    return jnp.result_type(float)


def abstract_state(
    policy: Params,
    reference: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective_state: Mapping[str, float],
) -> TrainState:
    """Shapes, dtypes and shardings of the state, from abstract parameters with shardings."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    abstract = jax.eval_shape(optimizer.init, policy)
    layout = state_shardings(abstract, jax.tree.map(lambda leaf: leaf.sharding, policy), mesh)
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, layout
    )
    number = jax.ShapeDtypeStruct((), _wide(), sharding=scalar.sharding)
    return TrainState(scalar, policy, reference, opt_state, dict.fromkeys(objective_state, number), scalar)


def state_shardings(abstract_opt_state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: trees shaped like the parameters are sharded like them, the rest replicated."""
    structure: Any = jax.tree.structure(params)

    def is_params(node: Any) -> bool:
        return bool(jax.tree.structure(node) == structure)

    scalar = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda node: params if is_params(node) else scalar, abstract_opt_state, is_leaf=is_params)
