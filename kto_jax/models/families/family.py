"""A family of models: how its config.json is read and written, and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.tensors import Tensor

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
      name: its `model_type` in a config.json.
      causal_lm: transformers' class for language models.
      classifier: transformers' class for the same decoder with a linear head of one output: a reward model; None if
        transformers has none.
      read: fields of TransformerConfig that not all families share, from a config.json completed with `defaults`.
      write: entries of a config.json that not all families share.
      tensors: names of its tensors: see tensors.py.
      defaults: transformers' defaults for entries that a config.json lacks.
      options: entries that must have one of these values or be absent; other values are not supported. Empty: any
        value.
      buffers: suffixes of tensors in older files that config.json determines; they are not read.
      renamed: other names in some files of tensors in `tensors`.
      omitted: entries of a config.json that all other families have.
    """

    name: str
    causal_lm: str
    classifier: str | None
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    defaults: Values = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    omitted: tuple[str, ...] = ()


def read_layers(values: Values, window: Any, is_local: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers are local.

    Args:
      values: a config.json; its `layer_types`, if present, takes precedence.
      window: sliding window of local layers; None if the model has none.
      is_local: whether each layer is local, if `layer_types` is absent.

    Raises:
      ConfigError: `layer_types` does not give each layer one of two kinds, or needs a window and there is none.
    """
    num_layers = values["num_hidden_layers"]
    if not isinstance(num_layers, int):
        return {}  # TransformerConfig refuses it by name.
    kinds = values.get("layer_types") or [
        "sliding_attention" if is_local(layer) else "full_attention" for layer in range(num_layers)
    ]
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ConfigError(
            f"The model's layer_types name {len(kinds)} layers as {', '.join(sorted(set(map(str, kinds))))}; each of "
            f"{num_layers} layers must be 'full_attention' or 'sliding_attention'. Choose another model."
        )
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if any(local) and window is None:
        raise ConfigError(
            "The model's layer_types name layers of sliding_attention, but it has no sliding_window. These need one. "
            "Fix its config.json."
        )
    if not any(local):
        return {"window": None, "local_layers": ()}
    return {"window": window, "local_layers": () if all(local) else local}


def write_layers(config: TransformerConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    local = config.layers_are_local
    return {
        "sliding_window": config.window,
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in local],
    }
