"""Loops over the microbatches of a step.

Trees of microbatches have a leading axis M, of which the first `count` entries are used. `count` is traced, so that one
compiled program serves every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Tree = TypeVar("Tree")
Result = TypeVar("Result")


def microbatch(tree: Tree, index: Int[Array, ""]) -> Tree:
    """One microbatch of a tree of arrays [M, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def zeros_for(function: Callable[[Tree], Result], tree: Tree) -> Result:
    """Zeros [M, ...] to hold the function's results for all microbatches."""
    num_microbatches = jax.tree.leaves(tree)[0].shape[0]
    one = jax.eval_shape(lambda tree: function(microbatch(tree, jnp.int32(0))), tree)
    return jax.tree.map(lambda leaf: jnp.zeros((num_microbatches, *leaf.shape), leaf.dtype), one)


def write_at(results: Result, index: Int[Array, ""], result: Result) -> Result:
    """The results, with one microbatch's written at `index`."""
    return jax.tree.map(lambda whole, one: whole.at[index].set(one), results, result)


def map_microbatches(function: Callable[[Tree], Result], tree: Tree, count: Int[Array, ""]) -> Result:
    """Applies a function to the first `count` microbatches; results are [M, ...], 0 beyond them."""
    function = jax.jit(function, inline=True)  # So that it is traced once, for its shapes and for the loop.

    def body(index: Int[Array, ""], results: Result) -> Result:
        return write_at(results, index, function(microbatch(tree, index)))

    return jax.lax.fori_loop(0, count, body, zeros_for(function, tree))
