"""The quantization_config of a config.json: which quantised directories are read, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError


def check_quantization(values: Mapping[str, Any]) -> bool:
    """Whether the weights beside a config.json are quantised; refuses those that are not read.

    Raises:
      ConfigError: they are quantised by another method than bitsandbytes in four bits; names the method.
    """
    settings = values.get("quantization_config")
    if not settings:
        return False
    settings = settings if isinstance(settings, dict) else {}
    method, bits = settings.get("quant_method"), settings.get("bits")
    is_read = settings.get("load_in_4bit", settings.get("_load_in_4bit"))
    if method in ("bitsandbytes", None) and is_read:
        return True
    if settings.get("load_in_8bit", settings.get("_load_in_8bit")):
        method, bits = "bitsandbytes", 8
    what = f"{method or 'an unnamed method'}{f', {bits} bits' if bits is not None else ''}"
    raise ConfigError(
        f"The model's config.json has a quantization_config ({what}), whose weights are not read. Read are "
        "unquantised safetensors, bitsandbytes in four bits, and .gguf files. Choose the unquantised model; "
        'config.reference.param_dtype="nf4" (or "int8") quantises it while it is read.'
    )
