"""The supported families of models: one file each, one line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.families.family import Family
from kto_jax.models.families.gemma import GEMMA1, GEMMA2, GEMMA3
from kto_jax.models.families.llama import LLAMA, MISTRAL
from kto_jax.models.families.mixture import MIXTRAL, OLMOE, QWEN3_MOE
from kto_jax.models.families.qwen import QWEN2, QWEN3

_ALL = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA1, GEMMA2, GEMMA3, OLMOE)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
ARCHITECTURES = tuple(family.causal_lm for family in FAMILIES.values())
CLASSIFIERS = tuple(family.classifier for family in FAMILIES.values() if family.classifier is not None)


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `architectures`, or by its `model_type` if it has none.

    Raises:
      ConfigError: the architecture or one of its options is not supported.
    """
    named = (values.get("architectures") or [None])[0]
    kind = values.get("model_type")
    by_class = {name: family for family in FAMILIES.values() for name in (family.causal_lm, family.classifier)}
    family = FAMILIES.get(str(kind)) if named is None else by_class.get(named)
    if family is None and (named == "Gemma3ForConditionalGeneration" or (named is None and kind == "gemma3")):
        raise ConfigError(
            "The model also reads images (Gemma3ForConditionalGeneration); only text models are supported. Choose a "
            "text model (Gemma3ForCausalLM, such as the 1B size), or save only the language model of this one."
        )
    if family is None:
        raise ConfigError(
            f"The model's architecture is {named or kind!r}; {', '.join(ARCHITECTURES + CLASSIFIERS)} are supported. "
            "Choose a model of one of these."
        )
    _refuse_options(family, values)
    return family


def _refuse_options(family: Family, values: Mapping[str, Any]) -> None:
    for name, options in {**family.options, "partial_rotary_factor": (1,)}.items():
        value = values.get(name)
        if value is not None and value not in options:
            raise ConfigError(
                f"The model's config.json has {name}={value!r}; only {options[0]!r} is supported. Choose a model "
                "without this option."
            )
    if values.get("quantization_config"):
        raise ConfigError(
            "The model's config.json has a quantization_config; unquantised safetensors and .gguf files are "
            "supported. Choose the unquantised model."
        )
