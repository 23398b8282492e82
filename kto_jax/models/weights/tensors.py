"""The tensors that a Hugging Face directory must hold for an architecture, and which parameters each holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.tensors import Tensor
from kto_jax.models.model import Model


class Rows(NamedTuple):
    """The rows of a fused tensor that belong to one of its parameters: blocks at regular distances.

    Attributes:
      start: the first row.
      block: rows of a block.
      period: distance between the first rows of two blocks.
    """

    start: int
    block: int
    period: int

    def places(self, first: int, last: int) -> np.ndarray:
        """The rows of the tensor that hold the parameter's outputs from `first` to before `last`, rising."""
        rows = np.arange(first, last)
        return rows // self.block * self.period + self.start + rows % self.block


class Part(NamedTuple):
    """A parameter in the tensors of a directory.

    Attributes:
      parameter: its name.
      tensor: how it is stored.
      rows: its rows of a fused tensor; None for the whole tensor.
      size: number of its outputs, the first axis of a stored matrix.
    """

    parameter: str
    tensor: Tensor
    rows: Rows | None
    size: int

    def read(
        self, read: Callable[[str, tuple[slice, ...]], np.ndarray], place: tuple[int, ...], index: tuple[slice, ...]
    ) -> np.ndarray:
        """The part `index` of the parameter's layer or expert at `place`, by the `read` of the directory's weights."""
        name, wanted = self.tensor.name.format(*place), self.tensor.index_in_file(index)
        if self.rows is None:
            return self.tensor.from_file(read(name, wanted))
        places = self.rows.places(wanted[0].start, wanted[0].stop)
        values = read(name, (slice(int(places[0]), int(places[-1]) + 1), *wanted[1:]))
        return self.tensor.from_file(values[places - places[0]])


class Expected(NamedTuple):
    """A tensor of a directory.

    Attributes:
      parts: the parameters that it holds, whole or one layer or expert of them.
      place: where it is in the parameters: the indices of layer and expert, or of the layer, or ().
      shape: its stored shape.
    """

    parts: tuple[Part, ...]
    place: tuple[int, ...]
    shape: tuple[int, ...]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor as it is stored, from its parameters (of one layer)."""
        if len(parts) == 1:
            return self.parts[0].tensor.to_file(parts[0])
        whole = np.empty(self.shape, parts[0].dtype)
        for part, values in zip(self.parts, parts, strict=True):
            assert part.rows is not None, "parts of a fused tensor have rows"
            whole[part.rows.places(0, part.size)] = part.tensor.to_file(values)
        return whole


def find_parts(config: TransformerConfig, *, reward: bool = False) -> dict[str, Part]:
    """Where each parameter of this architecture is stored.

    Args:
      config: the architecture.
      reward: whether it is a reward model, which has no output head.
    """
    return _parts(config, _parameter_shapes(config, reward))


def _parts(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    tensors = FAMILIES[config.family].tensors
    assert shapes.keys() <= tensors.keys(), f"{config.family} has no name for {shapes.keys() - tensors.keys()}"
    sharing: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if name in shapes:
            sharing.setdefault(tensor.name, []).append(name)
    parts = {}
    for names in sharing.values():
        start = 0
        for place, name in enumerate(names):
            tensor, size = tensors[name], shapes[name][-1]
            rows = None
            if tensor.fused == "blocks":
                rows = Rows(start, size, size)
            elif tensor.fused == "heads":
                rows = Rows(place * config.head_dim, config.head_dim, len(names) * config.head_dim)
            parts[name], start = Part(name, tensor, rows, size), start + size
    return parts


def expected_tensors(config: TransformerConfig, *, reward: bool = False) -> dict[str, Expected]:
    """Every tensor of a Hugging Face directory of this architecture, by name, ordered by layer.

    Args:
      config: the architecture.
      reward: whether it is a reward model, which has no output head.
    """
    shapes = _parameter_shapes(config, reward)
    parts = _parts(config, shapes)
    stacked = [name for name, part in parts.items() if part.tensor.is_stacked]
    last = ("final_norm.scale", "final_norm.bias", "head.weight", "scorer.weight")
    places: list[tuple[str, tuple[int, ...]]] = [("embed.table", ())]
    for layer in range(config.num_layers):
        for name in stacked:
            experts = np.ndindex(shapes[name][1 : parts[name].tensor.num_stacked])
            places += [(name, (layer, *expert)) for expert in experts]
    places += [(name, ()) for name in last if name in shapes]
    expected: dict[str, Expected] = {}
    for name, place in places:
        part = parts[name]
        shape = part.tensor.shape_in_file(shapes[name][len(place) :])
        stored = part.tensor.name.format(*place)
        before = expected.get(stored, Expected((), place, (0, *shape[1:])))
        expected[stored] = Expected((*before.parts, part), place, (before.shape[0] + shape[0], *shape[1:]))
    return expected


def expected_shapes(config: TransformerConfig, *, reward: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of `expected_tensors`."""
    return {name: expected.shape for name, expected in expected_tensors(config, reward=reward).items()}


def _parameter_shapes(config: TransformerConfig, reward: bool) -> dict[str, tuple[int, ...]]:
    abstract = Model.create(config, scalar_head="reward" if reward else "none").abstract_params("float32")
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {".".join(key.key for key in key_path): leaf.shape for key_path, leaf in leaves}
