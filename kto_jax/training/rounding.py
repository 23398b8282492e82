"""bfloat16 that still learns: numbers are computed in float32, and rounded by chance on the way to where they are kept.

bfloat16 has 8 bits of precision. A change smaller than half a step of a number is lost by rounding to the nearest, and
lost again the next time: a policy at KTO's learning rates stands still, and so does a second moment with b2 = 0.999.
Rounded up as often as the remainder says, and down otherwise, numbers are right in the mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, Key

# What a draw is for: the same place and step must not draw the same bits twice.
_MOMENTS, _PARAMS, _REFERENCE = 0, 1, 2


def round_by_chance(x: Float[Array, "*shape"], key: Key[Array, ""]) -> BFloat16[Array, "*shape"]:
    """Rounds to one of the two nearest bfloat16 numbers, so that the mean over draws is `x`.

    A bfloat16 number is the upper half of a float32 one: a uniform number of 16 bits is added to the lower half, which
    is then cut off. What is drawn depends on the key and the place in the array alone, however the array is laid over
    devices.

    Args:
      x: float32. Infinities and NaN stay what they are.
      key: decides the draws.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(drawn & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


class RoundedState(NamedTuple):
    """Updates made, and a state whose floating-point arrays are bfloat16."""

    num_updates: Int[Array, ""]
    state: Any


def keep_in_bfloat16(inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """The same transformation, its moments kept in bfloat16 between updates and float32 within them.

    Args:
      inner: for example `optax.adamw`.
      seed: with the number of the update, decides how moments are rounded.
    """

    def init(params: Any) -> RoundedState:
        state = inner.init(params)
        return RoundedState(
            jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_real(x) else x, state)
        )

    def update(updates: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_real(x) else x, state.state)
        updates, wide = inner.update(updates, wide, params)
        keys = _keys(seed, _MOMENTS, state.num_updates, wide)
        narrow = jax.tree.map(lambda x, key: round_by_chance(x, key) if _is_real(x) else x, wide, keys)
        return updates, RoundedState(optax.safe_increment(state.num_updates), narrow)

    return optax.GradientTransformation(init, update)


def reach_bfloat16(inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """The same transformation for parameters in bfloat16, whose updates lead to a sum that was rounded by chance.

    The inner transformation sees float32 parameters, and has the state that they give it. What it adds to them is
    added in float32 and rounded; the update is the rounded sum less the parameter, a difference that float32 holds, so
    that `optax.apply_updates` arrives at the rounded sum.

    Args:
      inner: the whole optimizer.
      seed: with the number of the update, decides how parameters are rounded.
    """

    def init(params: Any) -> tuple[Int[Array, ""], Any]:
        return jnp.zeros((), jnp.int32), inner.init(_widened(params))

    def update(updates: Any, state: tuple[Int[Array, ""], Any], params: Any) -> tuple[Any, tuple[Array, Any]]:
        count, inner_state = state
        wide = _widened(params)
        updates, inner_state = inner.update(updates, inner_state, wide)
        keys = _keys(seed, _PARAMS, count, params)
        updates = jax.tree.map(
            lambda p, u, key: round_by_chance(p + u, key).astype(jnp.float32) - p, wide, updates, keys
        )
        return updates, (optax.safe_increment(count), inner_state)

    return optax.GradientTransformation(init, update)


def round_reference(values: Any, reference: Any, step: Int[Array, ""]) -> Any:
    """A reference's next values in the types that it is kept in, by chance where that is bfloat16.

    A mean of policy and reference lies so near the reference that the nearest bfloat16 number may be the old one, at
    every move.

    Args:
      values: what it becomes, at least float32.
      reference: what it was; of the same structure.
      step: decides the draws, with the array's place among the others and nothing else.
    """

    def kept(x: Array, old: Array, key: Array) -> Array:
        return round_by_chance(x.astype(jnp.float32), key) if old.dtype == jnp.bfloat16 else x.astype(old.dtype)

    return jax.tree.map(kept, values, reference, _keys(0, _REFERENCE, step, reference))


def _is_real(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _widened(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _keys(seed: int, purpose: int, count: Int[Array, ""], tree: Any) -> Any:
    """A key for each array of a tree."""
    # By name: a run must draw the same bits whatever generator JAX is told to use for others.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), purpose)
    key = jax.random.fold_in(key, count)
    structure: Any = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, [jax.random.fold_in(key, place) for place in range(structure.num_leaves)])
