"""Gradient accumulation: the sum of a loss and its gradient over microbatches.

With JAX's mutable references (`jax.new_ref`) the backward pass adds to one gradient in place, layer by layer. Without a
separate gradient per microbatch, peak memory is one gradient smaller. The interface is new: if the installed JAX lacks
it, each microbatch's gradient is computed whole and added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kto_jax.models.model import Params
from kto_jax.training.microbatches import microbatch, write_at, zeros_for

Tree = TypeVar("Tree")
Result = TypeVar("Result")
# (parameters, microbatch) -> its share of the loss, and auxiliary results.
ShareOfLoss = Callable[[Params, Tree], tuple[Float[Array, ""], Result]]

_ad: Any = getattr(jax, "ad", None)
HAS_MUTABLE_REFS = hasattr(jax, "new_ref") and hasattr(_ad, "GradValue") and hasattr(_ad, "GradRef")
"""Whether the installed JAX can accumulate gradients in place."""


def accumulate_gradient(
    share_of_loss: ShareOfLoss,
    params: Params,
    tree: Tree,
    count: Int[Array, ""],
    *,
    in_place: bool = HAS_MUTABLE_REFS,
) -> tuple[Float[Array, ""], Params, Result]:
    """Sums a loss and its gradient over microbatches.

    Args:
      share_of_loss: function of the parameters and one microbatch.
      params: the gradient is with respect to these.
      tree: the microbatches [M, ...].
      count: number of microbatches that are used.
      in_place: whether to accumulate the gradient in place.

    Returns:
      The loss, its gradient in at least float32, and the results of all microbatches [M, ...].
    """
    losses, results = zeros_for(lambda one: share_of_loss(params, one), tree)
    start = (jnp.zeros((), losses.dtype), results)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), params)
    sum_over = _sum_in_place if in_place else _sum_whole_gradients
    return sum_over(share_of_loss, params, tree, count, start, zeros)


def _sum_whole_gradients(
    share_of_loss: ShareOfLoss, params: Params, tree: Tree, count: Array, start: tuple[Array, Result], zeros: Params
) -> tuple[Array, Params, Result]:
    def body(index: Int[Array, ""], carry: tuple[Array, Result, Params]) -> tuple[Array, Result, Params]:
        loss, results, total = carry
        one = microbatch(tree, index)
        part, backward, result = jax.vjp(lambda params: share_of_loss(params, one), params, has_aux=True)
        (gradient,) = backward(jnp.ones_like(part))
        total = jax.tree.map(lambda old, new: old + new.astype(old.dtype), total, gradient)
        return loss + part, write_at(results, index, result), total

    loss, results, total = jax.lax.fori_loop(0, count, body, (*start, zeros))
    return loss, total, results


def _sum_in_place(
    share_of_loss: ShareOfLoss, params: Params, tree: Tree, count: Array, start: tuple[Array, Result], zeros: Params
) -> tuple[Array, Params, Result]:
    total = jax.tree.map(jax.new_ref, zeros)

    def body(index: Int[Array, ""], carry: tuple[Array, Result]) -> tuple[Array, Result]:
        loss, results = carry
        one = microbatch(tree, index)
        part, backward, result = jax.vjp(lambda params: share_of_loss(params, one), params, has_aux=True)
        _add_gradient(total, params, backward, jnp.ones_like(part))
        return loss + part, write_at(results, index, result)

    loss, results = jax.lax.fori_loop(0, count, body, start)
    return loss, jax.tree.map(jax.ref.freeze, total), results


def _add_gradient(total: Any, params: Params, backward: Any, cotangent: Array) -> None:
    """Accumulates the backward pass into references; gradients of narrower parameters are cast before the addition."""
    in_place = jax.tree.map(lambda ref, leaf: ref if ref.dtype == leaf.dtype else _ad.GradValue(), total, params)
    (gradient,) = backward.with_refs(in_place)(cotangent)

    def add(ref: Any, new: Any) -> None:
        if not isinstance(new, _ad.GradRef):
            jax.ref.addupdate(ref, ..., new.astype(ref.dtype))

    jax.tree.map(add, total, gradient)
