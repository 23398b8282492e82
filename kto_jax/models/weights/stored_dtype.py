"""The dtype of a model's stored weights, and the dtype that holds them without loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import safetensors

from kto_jax.config import ConfigError
from kto_jax.models.families.quantization import check_quantization
from kto_jax.models.weights.bitsandbytes import BitsAndBytesWeights
from kto_jax.models.weights.safetensors_files import read_json, weight_files


def stored_dtype(path: Path) -> Literal["float32", "bfloat16", "nf4"]:
    """The narrowest of float32, bfloat16 and nf4 that holds every weight of a model exactly.

    "bfloat16" only if all weights are bfloat16: float16 and the dequantised weights of a .gguf file have more digits.
    "nf4" only if bitsandbytes quantised all matrices of the layers to it, and all else is bfloat16.

    Args:
      path: a Hugging Face directory or a .gguf file. For a directory without weights (`plan` fetches only config.json),
        the dtype in its config.json decides.

    Raises:
      ConfigError: a weights file is damaged, or config.json is missing.
    """
    if path.is_file():
        return "float32"
    has_weights = any(path.glob("*.safetensors"))
    file = path / "config.json"
    if file.is_file() and check_quantization(read_json(file)):
        return "nf4" if has_weights and BitsAndBytesWeights(path).are_nf4() else "float32"
    if has_weights:
        return "bfloat16" if set(_dtypes(weight_files(path))) == {"BF16"} else "float32"
    return "bfloat16" if "bfloat16" in _dtypes_in_config(path) else "float32"


def common_dtype(path: Path) -> Literal["float32", "bfloat16", "float16"]:
    """The dtype of a model's stored weights; float32 if there are several dtypes, and for a .gguf file.

    Of a model whose matrices are nf4, it is the dtype of all else.

    Args:
      path: as for `stored_dtype`.

    Raises:
      ConfigError: a weights file is damaged, or config.json is missing.
    """
    if stored_dtype(path) in ("bfloat16", "nf4"):
        return "bfloat16"
    if path.is_file():
        return "float32"
    if any(path.glob("*.safetensors")):
        return "float16" if set(_dtypes(weight_files(path))) == {"F16"} else "float32"
    return "float16" if "float16" in _dtypes_in_config(path) else "float32"


def _dtypes_in_config(path: Path) -> list[object]:
    """The dtypes in a config.json."""
    values = read_json(path / "config.json")
    return [part.get(name) for part in (values, values.get("text_config", {})) for name in ("dtype", "torch_dtype")]


def _dtypes(files: Iterable[Path]) -> Iterable[str]:
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                names = list(opened.keys())
                yield from (opened.get_slice(name).get_dtype() for name in names)
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} is damaged ({error}). Its header must describe the whole file. Download it again."
            ) from error
