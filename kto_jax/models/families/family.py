"""What a family of models is: how its config.json is read and written, and what its tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.tensors import Tensor
from kto_jax.models.rope import either_spelling, read_rope

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
      name: its `model_type` in a config.json.
      causal_lm: transformers' class of language models.
      classifier: transformers' class of the same decoder under a linear map to one number: a reward model.
      read: fields of TransformerConfig that not all families share, from a config.json that `defaults` have completed.
      write: entries of a config.json that not all families share.
      tensors: what its tensors are called: see tensors.py.
      defaults: what transformers takes where a config.json says nothing.
      options: entries that must have one of these values, or be absent; others are not built here.
    """

    name: str
    causal_lm: str
    classifier: str
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    defaults: Values = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


def read_one_rope(values: Values) -> dict[str, Any]:
    """Rotary settings of a family whose layers share them."""
    theta = values.get("rope_theta")
    theta, scaling = read_rope(either_spelling(values), 10000.0 if theta is None else theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_one_rope(config: TransformerConfig) -> dict[str, Any]:
    """Rotary settings in the older spelling, which both older and newer readers know."""
    scaling = config.rope_scaling
    return {"rope_theta": config.rope_theta, "rope_scaling": None if scaling is None else scaling.to_hugging_face()}


def read_layers(values: Values, window: Any, is_local: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers are local.

    Args:
      values: a config.json, whose `layer_types` decides where it is given.
      window: what local layers see; None where the model has no window.
      is_local: the kind of each layer where `layer_types` is not given.

    Raises:
      ConfigError: `layer_types` is not one of two kinds for each layer, or needs a window that is not there.
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
            "Mend its config.json."
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
