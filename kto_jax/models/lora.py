"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W plus a small trained product, W + s · A B.

The scale s is α/r, or α/√r of a rank-stabilised adapter (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) also trains
the norm of each output's weights: it multiplies the sum's columns by m / ‖W + s · A B‖, of which the norm has no
gradient. The adapters are a separate parameter tree, with an `Adapter` for each adapted matrix:

    layers.attention.query, key, value, output .weight    a [layers, in, r], b [layers, r, out]
    layers.mlp.gate, up, down                  .weight    a, b; of every expert, [layers, E, in, r] and so on
                                                          with DoRA also magnitude [layers, out]
    embed.table, head.weight                              whole, if they are trained too

Merging them into the frozen parameters replaces each such W, which may be quantised, by an `AdaptedMatrix`. Training
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
WHOLE = {"embedding": "embed", "head": "head"}
"""Parts of the parameters that may be trained whole, by their names in `lora.modules_to_save`."""


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
class DoraAdapter(Adapter):
    """Low-rank factors and a magnitude.

    Attributes:
      magnitude: m, [..., out].
    """

    magnitude: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
    """A frozen matrix and its adapter.

    Attributes:
      frozen: W, [..., in, out], an array or a quantised matrix.
      adapter: A and B.
      scale: s.
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
        """The product s · B."""
        return self.scale * self.adapter.b

    def astype(self, dtype: Any) -> Array:
        """The matrix that the adapter makes of W, in `dtype`, computed in float32 or wider."""
        wide = jnp.promote_types(dtype, jnp.float32)
        total = self._sum(wide)
        if isinstance(self.adapter, DoraAdapter):
            total = total * self._gain(total)[..., None, :]
        return total.astype(dtype)

    def gain(self) -> Array:
        """What DoRA multiplies each output by, [out], in float32 or wider."""
        return self._gain(self._sum(jnp.promote_types(self.adapter.b.dtype, jnp.float32)))

    def dropped(self, x_TI: Array) -> Array:
        """The adapter's input: x itself, without dropout."""
        return x_TI

    def _sum(self, wide: Any) -> Array:
        product = jnp.matmul(self.a.astype(wide), self.scaled_b.astype(wide), precision=jax.lax.Precision.HIGHEST)
        return self.frozen.astype(wide) + product

    def _gain(self, total: Array) -> Array:
        assert isinstance(self.adapter, DoraAdapter), "only DoRA has a magnitude"
        return self.adapter.magnitude.astype(total.dtype) / jax.lax.stop_gradient(_norms(total))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DroppedMatrix(AdaptedMatrix):
    """As `AdaptedMatrix`, while it is trained with dropout of the adapter's input.

    Attributes:
      rate: share of the entries that are dropped.
      key: PRNG key of the mask; one for each layer.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: Any

    def dropped(self, x_TI: Array) -> Array:
        """The adapter's input: x with some entries 0 and the others scaled up."""
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x_TI.shape)
        return jnp.where(kept, x_TI / jnp.asarray(1 - self.rate, x_TI.dtype), 0)


def _norms(matrix: Array) -> Array:
    """The norm of each output's weights."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=-2))


def rank_of(lora: LoraConfig, matrix: str) -> int:
    """The rank of a matrix's adapter."""
    return int(_of_pattern(lora.rank_pattern, matrix, lora.rank))


def scale_of(lora: LoraConfig, matrix: str) -> float:
    """The factor of the product of a matrix's adapter."""
    rank = rank_of(lora, matrix)
    return _of_pattern(lora.alpha_pattern, matrix, lora.alpha) / (rank**0.5 if lora.rank_stabilised else rank)


def _of_pattern(pattern: Sequence[str], matrix: str, default: float) -> float:
    for entry in pattern:
        name, _, number = entry.rpartition("=")
        if name == matrix:
            return float(number)
    return default


def init_adapters(params: Any, lora: LoraConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Adapters in float32 whose product is 0.

    The nonzero factor is uniform in ±1/√n, where n is its input size: "in" for A, r for B. Magnitudes are 0:
    `with_magnitudes` sets them.

    Args:
      params: the model's parameters or their shapes.
      lora: which matrices, with which ranks; names are those of GROUPS (see `resolve_lora`).
      key: PRNG key.
    """

    def draw(name: str, weight: Any, key: Array) -> Adapter:
        *stacked, size_in, size_out = weight.shape
        rank = rank_of(lora, name)
        shapes = {"a": (*stacked, size_in, rank), "b": (*stacked, rank, size_out)}

        def factor(which: str) -> Array:
            limit = shapes[which][-2] ** -0.5
            drawn = jax.random.uniform(key, shapes[which], minval=-limit, maxval=limit)
            return jnp.zeros(shapes[which]) if which == lora.zero else drawn

        factors = factor("a"), factor("b")
        return DoraAdapter(*factors, jnp.zeros((*stacked, size_out))) if lora.dora else Adapter(*factors)

    keys = dict(zip(GROUPS, jax.random.split(key, len(GROUPS)), strict=True))
    layers = params["layers"]
    return _map_targets(
        _targets(layers, lora), lambda group, name: draw(name, layers[group][name]["weight"], keys[name])
    )  # fmt: skip


def with_magnitudes(adapters: Any, frozen: Any) -> Any:
    """Adapters whose product is 0, with DoRA's magnitudes at which the policy equals the frozen model."""
    if isinstance(adapters, DoraAdapter):
        frozen = frozen.frozen if isinstance(frozen, AdaptedMatrix) else frozen
        return dataclasses.replace(adapters, magnitude=_norms(frozen.astype(jnp.float32)))
    if not isinstance(adapters, dict):
        return adapters
    return {name: with_magnitudes(part, frozen.get(name)) for name, part in adapters.items()}


def adapter_axes(axes: Any, lora: LoraConfig) -> dict[str, Any]:
    """Logical axes of the adapters, from those of the model's parameters."""

    def split(group: str, name: str) -> Adapter:
        *stacked, axis_in, axis_out = axes["layers"][group][name]["weight"]
        factors = (*stacked, axis_in, "adapter"), (*stacked, "adapter", axis_out)
        return DoraAdapter(*factors, (*stacked, axis_out)) if lora.dora else Adapter(*factors)

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


def merge_adapters(frozen: Any, trained: Any, lora: LoraConfig, key: Key[Array, ""] | None = None) -> dict[str, Any]:
    """The policy's parameters, with an `AdaptedMatrix` in place of each matrix that has an adapter.

    Args:
      frozen: the parameters of a model, as arrays or quantised.
      trained: adapters, and other trained parameters, which take the place of those in `frozen`, if there are any.
      lora: scales and dropout.
      key: PRNG key of dropout; None for none.
    """
    keys = dict(zip(GROUPS, jax.random.split(key, len(GROUPS)), strict=True)) if key is not None else {}

    def merge(frozen: Any, trained: Any, matrix: str) -> Any:
        if isinstance(trained, Adapter):
            # A reference of adapters that are trained further holds them as they were.
            frozen = frozen.frozen if isinstance(frozen, AdaptedMatrix) else frozen
            scale = scale_of(lora, matrix)
            if keys and lora.dropout:
                per_layer = jax.random.split(keys[matrix], trained.a.shape[0])
                return DroppedMatrix(frozen, trained, scale, lora.dropout, per_layer)
            return AdaptedMatrix(frozen, trained, scale)
        if not isinstance(trained, dict) or frozen is None:
            return trained
        return {
            name: merge(frozen.get(name), trained[name], name if name in GROUPS else matrix)
            if name in trained
            else frozen[name]
            for name in {**frozen, **trained}
        }

    return merge(frozen, trained, "")


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
