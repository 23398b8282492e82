"""What a decoder is made of: read from a Hugging Face config.json, and written back as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kto_jax.config import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
# Reward models: the same decoder under a linear map to one number.
CLASSIFIERS = ("LlamaForSequenceClassification", "MistralForSequenceClassification")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches the slow frequencies of its rotary embedding.

    Attributes:
      factor: by how much wavelengths longer than `original_max_length / low_freq_factor` are stretched.
      low_freq_factor: where stretching is full.
      high_freq_factor: where stretching ends; wavelengths in between are interpolated.
      original_max_length: context of the model before it was stretched, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder of the Llama family.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      num_layers: blocks.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides `num_heads`.
      head_dim: H, width of a head; even, because rotary embedding turns pairs.
      mlp_dim: F, width of the feed-forward layer.
      max_length: longest sequence that the model was trained on, in tokens.
      norm_eps: epsilon of RMSNorm.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: llama3 scaling, or None.
      tied_head: whether the output head is the embedding, transposed.
      initializer_range: standard deviation of random weights.
      bos_id: id that starts a sequence, where the model has one.
      eos_ids: ids that end a sequence; the first is `eos_id`.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    tied_head: bool = False
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
        for name in (*sizes, "max_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"The model has {name}={value!r}; it must be an integer of at least 1. Mend its config.json."
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"The model has num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}; the first must be a "
                "multiple of the second. Mend its config.json."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"The model has head_dim={self.head_dim}; rotary embedding needs it even. Mend its config.json."
            )

    @property
    def eos_id(self) -> int | None:
        """The first of the ids that end a sequence; None where the model names none."""
        return self.eos_ids[0] if self.eos_ids else None

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """Reads the contents of a config.json.

        Args:
          values: the parsed file. Rotary settings may be spelled `rope_theta` and `rope_scaling`, or `rope_parameters`.

        Raises:
          ConfigError: the architecture or one of its options is not one that is built here, or a field is missing.
        """
        _refuse_other_architectures(values)
        missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                     "intermediate_size") if values.get(name) is None]  # fmt: skip
        if missing:
            raise ConfigError(
                f"The model's config.json lacks {', '.join(missing)}. A Llama config.json has them all. "
                "Download the file again."
            )
        num_heads = values["num_attention_heads"]
        theta, scaling = _rope(values)
        eos = values.get("eos_token_id")
        return cls(
            vocab_size=values["vocab_size"],
            embed_dim=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=_first(values.get("num_key_value_heads"), num_heads),
            head_dim=_first(values.get("head_dim"), values["hidden_size"] // num_heads),
            mlp_dim=values["intermediate_size"],
            max_length=_first(values.get("max_position_embeddings"), 2048),
            norm_eps=float(_first(values.get("rms_norm_eps"), 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_head=bool(values.get("tie_word_embeddings", False)),
            initializer_range=float(_first(values.get("initializer_range"), 0.02)),
            bos_id=values.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of a config.json that transformers, vLLM and `from_hugging_face` read as this model.

        The rotary settings take the older spelling, which both older and newer readers know.
        """
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_dim,
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_length,
            },
            "tie_word_embeddings": self.tied_head,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) > 1 else self.eos_id,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }

    def num_params(self) -> int:
        """Number of parameters, norms included; a tied head counts once."""
        norms = (2 * self.num_layers + 1) * self.embed_dim
        tables = (1 if self.tied_head else 2) * self.vocab_size * self.embed_dim
        return norms + tables + self.num_layers * self._layer_matmul_weights()

    def flops_per_token(self, attended: float, *, head: bool = True) -> float:
        """Floating-point operations of one token's forward pass; a backward pass costs twice as much.

        Args:
          attended: how many tokens it attends to, itself included: (L + 1) / 2 on average over a causal sequence.
          head: whether the token is also multiplied by the output head.

        Returns:
          Operations, a multiply-add counted as two. Norms, rotations and softmax are left out, as is the custom.
        """
        attention = 4.0 * attended * self.num_heads * self.head_dim
        per_layer = 2.0 * self._layer_matmul_weights() + attention
        return self.num_layers * per_layer + (2.0 * self.embed_dim * self.vocab_size if head else 0.0)

    def _layer_matmul_weights(self) -> int:
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.embed_dim * self.mlp_dim


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse_other_architectures(values: Mapping[str, Any]) -> None:
    named = values.get("architectures") or [{"llama": ARCHITECTURES[0], "mistral": ARCHITECTURES[1]}.get(
        values.get("model_type", ""), values.get("model_type"))]  # fmt: skip
    if named[0] not in ARCHITECTURES + CLASSIFIERS:
        raise ConfigError(
            f"The model's architecture is {named[0]!r}; {', '.join(ARCHITECTURES + CLASSIFIERS)} are built here. "
            "Choose a model of one of these."
        )
    allowed = {"attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,), "hidden_act": ("silu",),
               "partial_rotary_factor": (1, 1.0)}  # fmt: skip
    for name, options in allowed.items():
        value = _first(values.get(name), options[0])
        if value not in options:
            raise ConfigError(
                f"The model's config.json has {name}={value!r}; only {options[0]!r} is built here. "
                "Choose a model without this option."
            )
    if values.get("quantization_config"):
        raise ConfigError(
            "The model's config.json has a quantization_config; unquantised safetensors and .gguf files are read. "
            "Choose the unquantised model."
        )


def _rope(values: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling, from either spelling."""
    parameters = dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})
    theta = float(_first(parameters.get("rope_theta"), _first(values.get("rope_theta"), 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(
            f"The model's rotary embedding is scaled by {kind!r}; 'default' and 'llama3' are built here. "
            "Choose a model with one of these."
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if parameters.get(name) is None]
    if missing:
        raise ConfigError(
            f"The model's llama3 rotary scaling lacks {', '.join(missing)}; it needs {', '.join(names)}. "
            "Mend its config.json."
        )
    factor, low, high, original = (parameters[name] for name in names)
    return theta, Llama3Scaling(float(factor), float(low), float(high), int(original))
