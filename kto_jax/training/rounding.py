"""Stochastic rounding: bfloat16 weights and moments that still learn.

Updates are computed in float32 and rounded when they are stored. bfloat16 has 8 bits of precision, so rounding to
nearest loses every change below half a unit in the last place: at KTO's learning rates neither the policy nor a second
moment with b2 = 0.999 would move. Stochastic rounding rounds up with a probability equal to the remainder, so it is
correct on average.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, Key

# Streams of random bits: each use of an array at a step needs its own.
_MOMENTS, _PARAMS, _REFERENCE = 0, 1, 2


def round_stochastically(x: Float[Array, "*shape"], key: Key[Array, ""]) -> BFloat16[Array, "*shape"]:
    """Rounds stochastically to one of the two nearest bfloat16 numbers, so that the mean over draws is `x`.

    A bfloat16 number is the upper half of a float32 number. A uniform 16-bit number is added to the lower half, which
    is then truncated. The random bits depend only on the key and the position in the array, not on its sharding.

    Args:
      x: float32. Infinities and NaN are unchanged.
      key: PRNG key.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(drawn & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


class RoundedState(NamedTuple):
    """The number of updates, and a state whose floating-point arrays are bfloat16."""

    num_updates: Int[Array, ""]
    state: Any


def with_bfloat16_moments(inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Wraps a transformation so that its moments are stored in bfloat16 and updated in float32.

    Args:
      inner: for example `optax.adamw`.
      seed: of the rounding, together with the number of the update.
    """

    def init(params: Any) -> RoundedState:
        state = inner.init(params)
        return RoundedState(
            jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_floating(x) else x, state)
        )

    def update(updates: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_floating(x) else x, state.state)
        updates, wide = inner.update(updates, wide, params)
        keys = _keys(seed, _MOMENTS, state.num_updates, wide)
        narrow = jax.tree.map(lambda x, key: round_stochastically(x, key) if _is_floating(x) else x, wide, keys)
        return updates, RoundedState(optax.safe_increment(state.num_updates), narrow)

    return optax.GradientTransformation(init, update)


def with_bfloat16_params(inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Wraps an optimizer for bfloat16 parameters, whose updated values are stochastically rounded.

    The inner transformation gets float32 parameters, and its state matches them. Its update is added to them in float32
    and the sum is rounded. The returned update is the rounded sum minus the parameter, which float32 represents
    exactly, so that `optax.apply_updates` yields the rounded sum.

    Args:
      inner: the whole optimizer.
      seed: of the rounding, together with the number of the update.
    """

    def init(params: Any) -> tuple[Int[Array, ""], Any]:
        return jnp.zeros((), jnp.int32), inner.init(_to_float32(params))

    def update(updates: Any, state: tuple[Int[Array, ""], Any], params: Any) -> tuple[Any, tuple[Array, Any]]:
        count, inner_state = state
        wide = _to_float32(params)
        updates, inner_state = inner.update(updates, inner_state, wide)
        keys = _keys(seed, _PARAMS, count, params)
        updates = jax.tree.map(
            lambda p, u, key: round_stochastically(p + u, key).astype(jnp.float32) - p, wide, updates, keys
        )
        return updates, (optax.safe_increment(count), inner_state)

    return optax.GradientTransformation(init, update)


def round_reference(values: Any, reference: Any, step: Int[Array, ""]) -> Any:
    """A reference's next values in its stored dtypes, stochastically rounded for bfloat16.

    A weighted mean of policy and reference is so close to the reference that rounding to nearest could return the old
    value every time.

    Args:
      values: the next values, at least float32.
      reference: the current values, with the same structure.
      step: seeds the rounding, together with the array's position in the tree.
    """

    def kept(x: Array, old: Array, key: Array) -> Array:
        return round_stochastically(x.astype(jnp.float32), key) if old.dtype == jnp.bfloat16 else x.astype(old.dtype)

    return jax.tree.map(kept, values, reference, _keys(0, _REFERENCE, step, reference))


def _is_floating(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _to_float32(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _keys(seed: int, purpose: int, count: Int[Array, ""], tree: Any) -> Any:
    """A PRNG key for each array of a tree."""
    # The generator is explicit, so that a run draws the same bits whatever JAX's default is.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), purpose)
    key = jax.random.fold_in(key, count)
    structure: Any = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, [jax.random.fold_in(key, place) for place in range(structure.num_leaves)])
