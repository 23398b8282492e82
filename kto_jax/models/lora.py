"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W plus a small trained product, W + α/r · A B.

The adapters are a separate parameter tree, with an `Adapter` for each adapted matrix:

    layers.attention.query, key, value, output .weight    a [layers, in, r], b [layers, r, out]
    layers.mlp.gate, up, down                  .weight    a, b; of every expert, [layers, E, in, r] and so on

Merging them into the frozen parameters replaces each such W, which may be in int8, by an `AdaptedMatrix`. Training
starts with A B = 0, so that the policy equals the frozen model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from kto_jax.config import ConfigError, LoraConfig

# Where a matrix is among a layer's parameters.
GROUPS = dict.fromkeys(("query", "key", "value", "output"), "attention") | dict.fromkeys(("gate", "up", "down"), "mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A pair of low-rank factors, or what a tree of the same structure holds for each (shapes, shardings, axes).

    Attributes:
      a: A, [..., in, r].
      b: B, [..., r, out].
    """

    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
    """A frozen matrix and its adapter.

    Attributes:
      frozen: W, [..., in, out], an array or an `Int8Matrix`.
      adapter: A and B.
      scale: α/r.
    """

    frozen: Any
    adapter: Adapter
    scale: float = dataclasses.field(metadata={"static": True})

    def __getitem__(self, _: Any) -> AdaptedMatrix:
        # The modules read a whole parameter as `weight[...]`.
        return self

    @property
    def a(self) -> Array:
        """A."""
        return self.adapter.a

    @property
    def scaled_b(self) -> Array:
        """α/r · B."""
        return self.scale * self.adapter.b

    def astype(self, dtype: Any) -> Array:
        """The sum W + α/r · A B in `dtype`, computed in float32 or wider."""
        wide = jnp.promote_types(dtype, jnp.float32)
        product = jnp.matmul(self.a.astype(wide), self.scaled_b.astype(wide), precision=jax.lax.Precision.HIGHEST)
        return (self.frozen.astype(wide) + product).astype(dtype)


def init_adapters(params: Any, lora: LoraConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Adapters in float32 whose product is 0.

    The nonzero factor is uniform in ±1/√n, where n is its input size: "in" for A, r for B.

    Args:
      params: the model's parameters or their shapes.
      lora: which matrices, with which rank.
      key: PRNG key.
    """

    def draw(weight: Any, key: Array) -> Adapter:
        *stacked, size_in, size_out = weight.shape
        shapes = {"a": (*stacked, size_in, lora.rank), "b": (*stacked, lora.rank, size_out)}

        def factor(name: str) -> Array:
            limit = shapes[name][-2] ** -0.5
            drawn = jax.random.uniform(key, shapes[name], minval=-limit, maxval=limit)
            return jnp.zeros(shapes[name]) if name == lora.zero else drawn

        return Adapter(factor("a"), factor("b"))

    keys = dict(zip(GROUPS, jax.random.split(key, len(GROUPS)), strict=True))
    targets = _targets(params["layers"], lora)
    return _map_targets(targets, lambda group, name: draw(params["layers"][group][name]["weight"], keys[name]))


def adapter_axes(axes: Any, lora: LoraConfig) -> dict[str, Any]:
    """Logical axes of the adapters, from those of the model's parameters."""

    def split(group: str, name: str) -> Adapter:
        *stacked, axis_in, axis_out = axes["layers"][group][name]["weight"]
        return Adapter((*stacked, axis_in, "adapter"), (*stacked, "adapter", axis_out))

    return _map_targets(_targets(axes["layers"], lora), split)


def _targets(layers: Any, lora: LoraConfig) -> Sequence[str]:
    """The matrices that get an adapter: all that the model has, or those that are named.

    Raises:
      ConfigError: the model lacks one that is named.
    """
    has = [name for name, group in GROUPS.items() if name in layers[group]]
    missing = [name for name in lora.targets if name not in has]
    if missing and set(lora.targets) != set(GROUPS):
        raise ConfigError(
            f"config.lora.targets names {', '.join(missing)}, which the model lacks. It has {', '.join(has)}. Set "
            "config.lora.targets to some of these."
        )
    return [name for name in lora.targets if name in has]


def _map_targets(targets: Sequence[str], make: Any) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name in targets:
        layers.setdefault(GROUPS[name], {})[name] = {"weight": make(GROUPS[name], name)}
    return {"layers": layers}


def merge_adapters(frozen: Any, trained: Any, scale: float) -> dict[str, Any]:
    """The policy's parameters, with an `AdaptedMatrix` in place of each matrix that has an adapter.

    Args:
      frozen: the parameters of a model, as arrays or in int8.
      trained: adapters, and other trained parameters that `frozen` lacks.
      scale: α/r.
    """

    def merge(frozen: Any, trained: Any) -> Any:
        if isinstance(trained, Adapter):
            # A reference of adapters that are trained further holds them as they were.
            frozen = frozen.frozen if isinstance(frozen, AdaptedMatrix) else frozen
            return AdaptedMatrix(frozen, trained, scale)
        if not isinstance(trained, dict) or frozen is None:
            return trained
        return {
            name: merge(frozen.get(name), trained[name]) if name in trained else frozen[name]
            for name in {**frozen, **trained}
        }

    return merge(frozen, trained)


def without_adapters(params: Any) -> Any:
    """Parameters, or a tree of the same structure, with the frozen matrix in place of each `AdaptedMatrix`."""
    is_adapted = lambda node: isinstance(node, AdaptedMatrix)  # noqa: E731
    return jax.tree.map(lambda node: node.frozen if is_adapted(node) else node, params, is_leaf=is_adapted)


def adapters_of(params: Any) -> Any:
    """The adapters alone of parameters, or of a tree of the same structure, as `init_adapters` has them."""
    if isinstance(params, AdaptedMatrix):
        return params.adapter
    if not isinstance(params, dict):
        return None
    found = {name: adapters_of(part) for name, part in params.items()}
    return {name: part for name, part in found.items() if part is not None} or None
