"""Reads a Hugging Face config.json as a TransformerConfig, and writes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import FAMILIES, find_family, known_entries
from kto_jax.models.families.known_entries import Entries, refuse_unknown
from kto_jax.models.families.multimodal import text_values


def read_config_json(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads the contents of a config.json.

    Args:
      values: the parsed file. Missing entries get transformers' defaults. Rotary settings may be spelled `rope_theta`
        and `rope_scaling`, or `rope_parameters`. Of a model that also reads images, its language model is read.

    Raises:
      ConfigError: the architecture or one of its options is not supported or known, a field is missing or is of a
        wrong type.
    """
    try:
        return _read(values)
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"The model's config.json cannot be read ({type(error).__name__}: {error}). Its sizes must be integers and "
            "its options of the types that transformers writes. Download the file again."
        ) from error


def _read(file: Mapping[str, Any]) -> TransformerConfig:
    file = text_values(file)
    family = find_family(file)
    values = Entries({"max_position_embeddings": 2048, **family.defaults, **file})
    missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size") if values.get(name) is None]  # fmt: skip
    if missing:
        raise ConfigError(
            f"The model's config.json lacks {', '.join(missing)}. A config.json of {family.name} has all of them. "
            "Download the file again."
        )
    num_heads = values["num_attention_heads"]
    eos = values.get("eos_token_id")
    shared = {
        "vocab_size": values["vocab_size"],
        "embed_dim": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": _first(values.get("num_key_value_heads"), num_heads),
        "head_dim": _first(values.get("head_dim"), values["hidden_size"] // num_heads),
        "mlp_dim": values["intermediate_size"],
        "max_length": _first(values.get("max_position_embeddings"), 2048),
        "norm_eps": float(_first(values.get("rms_norm_eps"), 1e-6)),
        "tied_head": bool(values.get("tie_word_embeddings", False)),
        "initializer_range": float(_first(values.get("initializer_range"), 0.02)),
        "bos_id": values.get("bos_token_id"),
        "eos_ids": tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        "family": family.name,
    }
    config = TransformerConfig(**shared | family.read(values))
    refuse_unknown(values, known_entries(family), family.name)
    return config


def write_config_json(config: TransformerConfig) -> dict[str, Any]:
    """The contents of a config.json that transformers, vLLM and `read_config_json` read as this model.

    Rotary settings use the older spelling, which both older and newer readers accept.
    """
    family = FAMILIES[config.family]
    values = {
        "architectures": [family.causal_lm],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else config.eos_id,
    } | family.write(config)
    values = {name: value for name, value in values.items() if name not in family.omitted}
    # A field that the family's config.json cannot express would be lost silently.
    assert read_config_json(values) == config, f"no config.json of a {config.family} describes {config}"
    return values


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
