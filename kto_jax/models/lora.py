"""Low-rank adapters (LoRA, arXiv 2106.09685): beside a frozen matrix W a small trained product, W + α/r · A B.

What is trained is a tree of its own. Its matrices lie as [in, out], stacked over layers, as the model's do:

    layers.attention.query, key, value, output .weight .a [layers, in, r], .b [layers, r, out]
    layers.mlp.gate, up, down                  .weight .a, .b

Laid upon the frozen parameters, {"weight": W, "a": A, "b": B, "scale": [layers], α/r} stands in place of each such W,
which may be in int8. Where A B = 0, as it begins, the policy is the frozen model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from kto_jax.config import LoraConfig
from kto_jax.models.int8 import Int8Matrix

# Where a matrix is among a layer's parameters.
GROUPS = dict.fromkeys(("query", "key", "value", "output"), "attention") | dict.fromkeys(("gate", "up", "down"), "mlp")
_PARTS = {"weight", "a", "b", "scale"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
    """A frozen matrix and its adapter, as the modules see it.

    Attributes:
      frozen: [..., in, out].
      a: [..., in, r].
      b: [..., r, out].
      scale: [...], α/r.
    """

    frozen: Array | Int8Matrix
    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: Float[Array, "..."]

    def __getitem__(self, _: Any) -> AdaptedMatrix:
        # The modules ask for the whole of a parameter, `weight[...]`.
        return self

    @property
    def scaled_b(self) -> Float[Array, "..."]:
        """α/r · B."""
        return self.scale[..., None, None] * self.b

    def astype(self, dtype: Any) -> Array:
        """The matrix that the two amount to, in `dtype`; summed in float32 or wider."""
        wide = jnp.promote_types(dtype, jnp.float32)
        product = jnp.matmul(self.a.astype(wide), self.scaled_b.astype(wide), precision=jax.lax.Precision.HIGHEST)
        return (self.frozen.astype(wide) + product).astype(dtype)


def init_adapters(params: Any, lora: LoraConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Adapters in float32 whose product is 0.

    The matrix of a pair that is not zero is uniform within ±1/√n, n its inner size: "in" of A, r of B.

    Args:
      params: the model's parameters or their shapes.
      lora: which matrices, and how.
      key: decides the values.
    """

    def draw(weight: Any, key: Array) -> dict[str, Array]:
        layers, size_in, size_out = weight.shape
        shapes = {"a": (layers, size_in, lora.rank), "b": (layers, lora.rank, size_out)}
        return {
            name: jnp.zeros(shape)
            if name == lora.zero
            else jax.random.uniform(key, shape, minval=-(shape[1] ** -0.5), maxval=shape[1] ** -0.5)
            for name, shape in shapes.items()
        }

    keys = dict(zip(GROUPS, jax.random.split(key, len(GROUPS)), strict=True))
    return _of_each(lora.targets, lambda group, name: draw(params["layers"][group][name]["weight"], keys[name]))


def adapter_axes(axes: Any, lora: LoraConfig) -> dict[str, Any]:
    """Logical axes of the adapters, from those of the model's parameters."""

    def split(group: str, name: str) -> dict[str, tuple[str, ...]]:
        layers, axis_in, axis_out = axes["layers"][group][name]["weight"]
        return {"a": (layers, axis_in, "adapter"), "b": (layers, "adapter", axis_out)}

    return _of_each(lora.targets, split)


def _of_each(targets: Sequence[str], make: Any) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name in targets:
        layers.setdefault(GROUPS[name], {})[name] = {"weight": make(GROUPS[name], name)}
    return {"layers": layers}


def laid_upon(frozen: Any, trained: Any, scale: float) -> dict[str, Any]:
    """The policy's parameters.

    Args:
      frozen: the parameters of a model, as arrays or in int8.
      trained: adapters, and whatever else is trained that `frozen` does not have.
      scale: α/r.
    """

    def lay(frozen: Any, trained: Any) -> Any:
        if not isinstance(trained, dict) or frozen is None:
            return trained
        if trained.keys() == {"a", "b"}:
            # Beside them, not multiplied with them: the step adds to the gradients of A and B as they stand.
            layers, dtype = len(trained["b"]), trained["b"].dtype
            # Of NumPy: of several processes each has the whole of it.
            return {"weight": frozen, **trained, "scale": np.full(layers, scale, dtype)}
        return {
            name: lay(frozen.get(name), trained[name]) if name in trained else frozen[name]
            for name in {**frozen, **trained}
        }

    return lay(frozen, trained)


def as_adapted(params: Any) -> Any:
    """The same parameters, an `AdaptedMatrix` in place of each matrix with an adapter; others are left alone."""
    if not isinstance(params, dict):
        return params
    return {
        name: AdaptedMatrix(node["weight"], node["a"], node["b"], node["scale"])
        if isinstance(node, dict) and node.keys() == _PARTS
        else as_adapted(node)
        for name, node in params.items()
    }
