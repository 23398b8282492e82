"""The tensors that a Hugging Face directory must hold for an architecture."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.tensors import Tensor
from kto_jax.models.model import Model


class Expected(NamedTuple):
    """A tensor of a directory.

    Attributes:
      parameter: name of the parameter that it is, or is one layer of.
      place: where it is in the parameter: the indices of layer and expert, or of the layer, or ().
      tensor: how it is stored.
      shape: its stored shape.
    """

    parameter: str
    place: tuple[int, ...]
    tensor: Tensor
    shape: tuple[int, ...]


def expected_tensors(config: TransformerConfig, *, reward: bool = False) -> dict[str, Expected]:
    """Every tensor of a Hugging Face directory of this architecture, by name, ordered by layer.

    Args:
      config: the architecture.
      reward: whether it is a reward model, which has no output head.
    """
    shapes, tensors = _parameter_shapes(config, reward), FAMILIES[config.family].tensors
    assert shapes.keys() <= tensors.keys(), f"{config.family} has no name for {shapes.keys() - tensors.keys()}"
    stacked = [name for name in tensors if name in shapes and tensors[name].is_stacked]
    places: list[tuple[str, tuple[int, ...]]] = [("embed.table", ())]
    for layer in range(config.num_layers):
        for name in stacked:
            experts = np.ndindex(shapes[name][1 : tensors[name].num_stacked])
            places += [(name, (layer, *expert)) for expert in experts]
    places += [(name, ()) for name in ("final_norm.scale", "head.weight", "scorer.weight") if name in shapes]
    expected = {}
    for name, index in places:
        tensor = tensors[name]
        shape = tensor.shape_in_file(shapes[name][len(index) :])
        expected[tensor.name.format(*index)] = Expected(name, index, tensor, shape)
    return expected


def expected_shapes(config: TransformerConfig, *, reward: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of `expected_tensors`."""
    return {name: expected.shape for name, expected in expected_tensors(config, reward=reward).items()}


def _parameter_shapes(config: TransformerConfig, reward: bool) -> dict[str, tuple[int, ...]]:
    abstract = Model.create(config, scalar_head="reward" if reward else "none").abstract_params("float32")
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {".".join(key.key for key in key_path): leaf.shape for key_path, leaf in leaves}
