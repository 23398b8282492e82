"""Which matrices the names in a LoRA configuration stand for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from kto_jax.config import LORA_MATRICES, ConfigError, LoraConfig
from kto_jax.config.names import closest
from kto_jax.models.config import TransformerConfig
from kto_jax.models.lora import GROUPS
from kto_jax.models.weights.tensors import find_parts

_ALL = "all-linear"


def resolve_lora(lora: LoraConfig, config: TransformerConfig) -> LoraConfig:
    """The configuration with matrices by their own names, for a model of this architecture.

    Args:
      lora: names may also be those of modules in transformers, regular expressions for them, or "all-linear".
      config: the architecture.

    Raises:
      ConfigError: a name stands for no matrix, or for that of some layers only; or a pattern has no use.
    """
    modules = _modules(config)
    if set(lora.targets) == set(LORA_MATRICES):
        targets = tuple(modules)
    else:
        chosen = {matrix for name in lora.targets for matrix in _matrices(name, modules, "targets")}
        targets = tuple(matrix for matrix in modules if matrix in chosen)
    resolved = dataclasses.replace(
        lora, targets=targets, rank_pattern=_resolve_pattern(lora.rank_pattern, "rank_pattern", modules, targets),
        alpha_pattern=_resolve_pattern(lora.alpha_pattern, "alpha_pattern", modules, targets),
        modules_to_save=tuple(lora.modules_to_save),
    )  # fmt: skip
    of_experts = [matrix for matrix in targets if config.num_experts and GROUPS[matrix] == "mlp"]
    if of_experts and (lora.dora or lora.dropout):
        raise ConfigError(
            f"config.lora.{'dora' if lora.dora else 'dropout'} is set, and config.lora.targets has matrices of experts "
            f"({', '.join(of_experts)}), whose adapters have neither DoRA nor dropout. Set config.lora.targets to "
            "query,key,value,output, or take the setting out."
        )
    if config.tied_head and "head" in lora.modules_to_save:
        raise ConfigError(
            f"config.lora.modules_to_save={lora.modules_to_save!r} cannot be used: the model's head is its embedding. "
            'Allowed: "embedding", which trains both. Set config.lora.modules_to_save=embedding.'
        )
    return resolved


def _modules(config: TransformerConfig) -> dict[str, list[str]]:
    """The module of each matrix in every layer, or of every expert of every layer."""
    parts = find_parts(config)
    found = {}
    for matrix, group in GROUPS.items():
        if (part := parts.get(f"layers.{group}.{matrix}.weight")) is not None:
            name = part.tensor.name.removesuffix(".weight")
            stacked = (config.num_layers, config.num_experts)[: name.count("{}")]
            found[matrix] = [name.format(*index) for index in np.ndindex(stacked)]
    return found


def _matrices(name: str, modules: Mapping[str, Sequence[str]], field: str) -> list[str]:
    """The matrices that a name stands for, as peft reads it: the end of a module's name, or a regular expression."""
    if name == _ALL:
        return list(modules)
    if name in modules:
        return [name]
    try:
        fits = re.compile(rf"(.*\.)?({name})").fullmatch
    except re.error as error:
        raise ConfigError(
            f"config.lora.{field} names {name!r}, which is no regular expression ({error}). {_allowed(modules)} "
            f"Correct config.lora.{field}."
        ) from error
    found = []
    for matrix, names in modules.items():
        hits = [fits(module) is not None for module in names]
        if any(hits) and not all(hits):
            raise ConfigError(
                f"config.lora.{field} names {name!r}, which fits {matrix} in {sum(hits)} of {len(hits)} layers. A "
                f"matrix has adapters in all layers (and experts) or in none. Correct config.lora.{field}."
            )
        found += [matrix] if any(hits) else []
    if not found:
        meant = closest(name, [*modules, *(names[0].split(".")[-1] for names in modules.values()), _ALL])
        raise ConfigError(
            f"config.lora.{field} names {name!r}, which is no matrix of the model. "
            f"{f'Did you mean {meant!r}? ' if meant else ''}{_allowed(modules)} Embedding and head: "
            f"config.lora.modules_to_save. Correct config.lora.{field}."
        )
    return found


def _allowed(modules: Mapping[str, Sequence[str]]) -> str:
    own = dict.fromkeys(names[0].split(".")[-1] for names in modules.values())
    return f'Allowed: {", ".join([*modules, *own])}, a regular expression for the whole name, or "{_ALL}".'


def _resolve_pattern(
    pattern: Sequence[str], field: str, modules: Mapping[str, Sequence[str]], targets: Sequence[str]
) -> tuple[str, ...]:
    values: dict[str, str] = {}
    for entry in pattern:
        name, equals, number = entry.rpartition("=")
        is_number = re.fullmatch(r"[1-9]\d*" if field == "rank_pattern" else r"\d*\.?\d+(e-?\d+)?", number)
        if not equals or not is_number or float(number) <= 0:
            raise ConfigError(
                f"config.lora.{field} has {entry!r}. Allowed: NAME=NUMBER, such as query=8, with a number above 0. "
                f"Correct config.lora.{field}."
            )
        for matrix in _matrices(name, modules, field):
            if matrix not in targets:
                raise ConfigError(
                    f"config.lora.{field} has {entry!r}, and {matrix} has no adapter. Allowed: names among "
                    f"config.lora.targets, {', '.join(targets)}. Correct one of the two."
                )
            values.setdefault(matrix, number)
    return tuple(f"{matrix}={number}" for matrix, number in values.items())
