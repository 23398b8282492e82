"""The supported families of models: one file each, one line in FAMILIES."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.families.family import Family
from kto_jax.models.families.gemma import GEMMA1, GEMMA2, GEMMA3
from kto_jax.models.families.gpt_neox import GPT_NEOX
from kto_jax.models.families.granite import GRANITE
from kto_jax.models.families.llama import LLAMA, MISTRAL
from kto_jax.models.families.mixture import MIXTRAL, OLMOE, QWEN3_MOE
from kto_jax.models.families.multimodal import MULTIMODAL
from kto_jax.models.families.olmo import OLMO2
from kto_jax.models.families.phi import PHI3
from kto_jax.models.families.quantization import check_quantization
from kto_jax.models.families.qwen import QWEN2, QWEN3
from kto_jax.models.families.starcoder import STARCODER2

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA1, GEMMA2, GEMMA3, PHI3, OLMO2, GPT_NEOX, GRANITE, STARCODER2)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_DENSE, MIXTRAL, QWEN3_MOE, OLMOE)}
ARCHITECTURES = tuple(family.causal_lm for family in FAMILIES.values())
CLASSIFIERS = tuple(family.classifier for family in FAMILIES.values() if family.classifier is not None)
# Of all families, unless they state otherwise.
_OPTIONS: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1,), "attention_dropout": (0,)}


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `architectures`, or by its `model_type` if it has none.

    Raises:
      ConfigError: the architecture or one of its options is not supported.
    """
    named = (values.get("architectures") or [None])[0]
    kind = values.get("model_type")
    by_class = {name: family for family in FAMILIES.values() for name in (family.causal_lm, family.classifier)}
    family = FAMILIES.get(str(kind)) if named is None else by_class.get(named)
    if family is None:
        given, multimodal = str(kind if named is None else named), [model.architecture for model in MULTIMODAL]
        supported = [*ARCHITECTURES, *CLASSIFIERS, *multimodal]
        nearest = difflib.get_close_matches(given, supported if named is not None else FAMILIES, n=1, cutoff=0.0)
        raise ConfigError(
            f"The model's architecture is {given!r}; {', '.join(supported)} are supported. The nearest by name is "
            f"{nearest[0]}. Choose a model of one of these."
        )
    _refuse_options(family, values)
    return family


def known_entries(family: Family) -> set[str]:
    """The entries of a config.json that a family knows besides those that it reads."""
    return {*family.defaults, *family.options, *_OPTIONS}


def _refuse_options(family: Family, values: Mapping[str, Any]) -> None:
    for name, options in {**_OPTIONS, **family.options}.items():
        value = values.get(name)
        if options and value is not None and value not in options:
            raise ConfigError(
                f"The model's config.json has {name}={value!r}; only {options[0]!r} is supported. Choose a model "
                "without this option."
            )
    check_quantization(values)
