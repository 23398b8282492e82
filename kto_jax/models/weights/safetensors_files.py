"""The safetensors files of a Hugging Face directory: finds, checks, reads and writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors

from kto_jax.config import ConfigError
from kto_jax.storage.hub import WEIGHTS, WEIGHTS_INDEX

_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor."""


class SafetensorsWeights:
    """The tensors in a Hugging Face directory's safetensors, one file or several.

    Attributes:
      shapes: shape of every tensor by name.
      dtypes: its dtype, as the format spells it.
    """

    def __init__(self, directory: Path, file_name: str | None = None, *, dtypes: Sequence[str] = _FLOATS):
        """Opens all files, or the one that is named, and reads their headers.

        Args:
          directory: where they are.
          file_name: the only one to open; None for all.
          dtypes: those that are allowed.

        Raises:
          ConfigError: there are no safetensors, a file is damaged or outside the directory, or the index is wrong.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._allowed = dtypes
        self._slices: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        files = _safetensors_files(directory) if file_name is None else {file_name: None}
        for name, expected in files.items():
            self._open(_inside(directory, name), expected)

    def _open(self, file: Path, expected: set[str] | None) -> None:
        try:
            opened = safetensors.safe_open(file, framework="numpy")
            names = set(opened.keys())
        except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file} is damaged or not a safetensors file ({error}). Its header must describe the whole file. "
                "Download it again."
            ) from error
        if expected is not None and names != expected:
            raise ConfigError(
                f"{file} and model.safetensors.index.json disagree about {listed(names ^ expected)}. Each tensor must "
                "be in the file that the index names. Download the model again."
            )
        for name in names:
            part = opened.get_slice(name)
            if name in self._slices:
                raise ConfigError(
                    f"{file} holds {name}, which another file also holds. Remove the file that is not wanted."
                )
            if part.get_dtype() not in self._allowed:
                raise ConfigError(
                    f"{file}: tensor {name} is {part.get_dtype()}; {', '.join(self._allowed)} are supported. Choose "
                    "the unquantised model."
                )
            self._slices[name], self.shapes[name] = part, tuple(part.get_shape())
            self.dtypes[name] = part.get_dtype()
        self._files[file.name] = opened

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part `index` of a tensor, and no other bytes."""
        return self._slices[name][index]


class RenamedWeights:
    """Weights by other names.

    Attributes:
      shapes: shape of every tensor by its new name.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str | None]):
        """Renames tensors.

        Args:
          weights: the weights.
          names: the new name of each; tensors whose new name is None are left out.
        """
        self._weights, self._own = weights, {new: old for old, new in names.items() if new is not None}
        self.shapes = {new: weights.shapes[old] for new, old in self._own.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part `index` of the tensor with this new name."""
        return self._weights.read(self._own[name], index)


def write_safetensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, tensors: Iterable[np.ndarray]
) -> None:
    """Writes a file tensor by tensor, so that only one tensor is in memory at a time.

    The safetensors library needs all of a file's tensors at once.

    Args:
      file: the path.
      shapes: shape of every tensor by name, in the order of `tensors`.
      dtype: of all tensors.
      tensors: the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (shape, jnp.dtype(dtype))
            # As bytes: NumPy gives no buffer of bfloat16.
            out.write(np.ascontiguousarray(tensor).view(np.uint8).data)


def listed(names: Any) -> str:
    """Names for a message: the first eight, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_json(file: Path) -> dict[str, Any]:
    """Parses a file of a model directory.

    Raises:
      ConfigError: it is missing, not JSON, or not an object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not readable JSON ({error}). Download the model again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}; it must hold an object. Download the model again.")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The files with a directory's weights, sorted by name: it may hold other formats too.

    Raises:
      ConfigError: there are none, one is outside the directory, or the index is wrong.
    """
    return [_inside(directory, file_name) for file_name in sorted(_safetensors_files(directory))]


def _safetensors_files(directory: Path) -> dict[str, set[str] | None]:
    """The directory's files, each with its tensors according to the index (None: no index)."""
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConfigError(f"{index} has no weight_map from tensors to files. Download the model again.")
        files: dict[str, set[str] | None] = {}
        for name, file_name in weight_map.items():
            files.setdefault(file_name, set()).add(name)  # type: ignore[union-attr]
        return files
    if (directory / WEIGHTS).is_file():
        return {WEIGHTS: None}
    pickled = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in directory.glob(f"*.{suffix}"))
    if pickled:
        raise ConfigError(
            f"{directory} holds only pickled weights ({listed(pickled)}), which can run code when they are opened; "
            "safetensors and .gguf are supported. Convert them if you trust them: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    raise ConfigError(
        f"{directory} holds no model.safetensors and no model.safetensors.index.json. A model is a Hugging Face "
        "directory with safetensors, or a .gguf file. Check model.path."
    )


def _inside(directory: Path, file_name: str) -> Path:
    """The file, if it is in the directory; links into blobs/, as in the Hub's cache, are allowed."""
    root = directory.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    file = directory / file_name
    if (
        "\0" in file_name
        or Path(file_name).name != file_name
        or not any(file.resolve().is_relative_to(place) for place in allowed)
    ):
        raise ConfigError(
            f"{directory} names the weights file {file_name!r}, which is outside it. Weights must be in the model's "
            "own directory. Do not use this model unless you know why; if you do, copy the file into the directory."
        )
    if not file.is_file():
        raise ConfigError(f"{directory} lacks {file_name}, which its index names. Download the model again.")
    return file
