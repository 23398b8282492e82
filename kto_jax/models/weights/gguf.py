"""Weights and architecture from a GGUF file, in Hugging Face's names and layout.

The file is memory-mapped, and only the requested rows are dequantised. gguf_layout.py says how llama.cpp's names, order
of rows and values differ.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.weights.gguf_layout import (
    ARCHITECTURES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Layout,
    find_layout,
)
from kto_jax.models.weights.gguf_metadata import Metadata, read_metadata
from kto_jax.storage.gguf_files import open_gguf_file

_FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def open_gguf(path: Path) -> GgufWeights:
    """Opens a file, cached: parsing the vocabulary in its metadata takes seconds.

    Raises:
      ConfigError: as `GgufWeights`.
    """
    return _open_cached(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open_cached(path: Path, modified: int) -> GgufWeights:
    del modified  # Part of the key: a rewritten file is read again.
    return GgufWeights(path)


class GgufWeights:
    """The tensors of a GGUF file.

    Attributes:
      path: the file.
      config: the architecture, from the file's metadata.
      shapes: shape of every tensor by its Hugging Face name, [out, in] for projections.
    """

    def __init__(self, path: Path):
        """Opens a file and reads its metadata.

        Raises:
          ConfigError: it is not a GGUF file, or its architecture is not supported.
        """
        self.path = path
        reader = open_gguf_file(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        try:
            fields = {name: field.contents() for name, field in reader.fields.items() if _is_read(name)}
            self._layout, self.config = self._read_config(fields)
        except ConfigError:
            raise
        except Exception as error:  # Values of any type and size may be in any field.
            raise ConfigError(
                f"{path} has metadata that describe no model ({type(error).__name__}: {error}). A .gguf file of one of "
                f"the architectures {', '.join(ARCHITECTURES)} is needed. Download the file again."
            ) from error
        self._places = dict(self._find_places(self._layout))
        self.shapes = {
            name: _shape(self._tensors[stored])[0 if expert is None else 1 :]
            for name, (stored, expert) in self._places.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises the part `index` of the tensor with this Hugging Face name, float32.

        Raises:
          ConfigError: the gguf package cannot dequantise the tensor.
        """
        from gguf import quants

        stored, expert = self._places[name]
        tensor = self._tensors[stored]
        data = tensor.data if expert is None else tensor.data[expert]
        order = self._layout.row_order(name, self.config)
        rows: Any = index[0] if order is None else order[index[0]]
        try:
            values = quants.dequantize(np.ascontiguousarray(data[rows]), tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            raise ConfigError(
                f"{self.path}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantise; it can dequantise Q4_1, Q8_0, F16, F32 and most others. Choose another file of "
                "the same model."
            ) from error
        offset = self._layout.offset(name, self.config)
        return (values - np.float32(offset) if offset else values)[(slice(None), *index[1:])]

    def _read_config(self, fields: dict[str, Any]) -> tuple[Layout, TransformerConfig]:
        """The architecture, from metadata; vocabulary size and tied head from the tensors."""
        architecture = str(fields.get("general.architecture"))
        values = {
            key.removeprefix(f"{architecture}."): value
            for key, value in fields.items()
            if key.startswith(f"{architecture}.")
        }
        layout = find_layout(architecture, has_experts=bool(values.get("expert_count")))
        if layout is None:
            raise ConfigError(
                f"{self.path} holds a model of architecture {architecture!r}; {', '.join(ARCHITECTURES)} are "
                "supported. Choose a model of one of these, or its Hugging Face directory."
            )
        if "token_embd.weight" not in self._tensors:
            raise ConfigError(
                f"{self.path} lacks the tensor token_embd.weight, which every model has. Download it again."
            )
        config = read_metadata(
            Metadata(values, self.path, architecture),
            layout,
            vocab_size=_shape(self._tensors["token_embd.weight"])[0],
            tied_head="output.weight" not in self._tensors,
            factors={name: self._tensors[name].data for name in _FACTORS if name in self._tensors},
        )
        bos, eos = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        return layout, dataclasses.replace(config, bos_id=bos, eos_ids=() if eos is None else (eos,))

    def _find_places(self, layout: Layout) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Every tensor by its Hugging Face name, with its name here and the expert's number.

        An unknown tensor keeps its name, and the comparison of names refuses it.
        """
        templates = layout.templates()
        for stored, tensor in self._tensors.items():
            layer = re.match(r"blk\.(\d+)\.", stored)
            template = templates.get(re.sub(r"^blk\.\d+\.", "blk.{}.", stored))
            if template is None:
                if stored not in _FACTORS:
                    yield stored, (stored, None)
            elif template.count("{}") < 2:
                yield template.format(*layer.groups() if layer else ()), (stored, None)
            else:
                for expert in range(_shape(tensor)[0]):
                    yield template.format(layer[1] if layer else "", expert), (stored, expert)


def _is_read(key: str) -> bool:
    """Whether a field is part of the architecture: all others may be large, such as the vocabulary."""
    return not key.startswith("tokenizer.") or key.endswith(("bos_token_id", "eos_token_id"))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))
