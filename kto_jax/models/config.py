"""The architecture of a decoder: sizes and options, independent of any file format."""

from __future__ import annotations

import dataclasses
from typing import Literal

from kto_jax.config import ConfigError
from kto_jax.models.rope import LongRopeScaling, Scaling

_MOST_LAYERS = 10_000
"""More would only fill the memory with names of tensors."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The architecture of a decoder.

    The defaults from `activation` on are Llama's. Families differ only in these: see families/.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      num_layers: blocks.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides `num_heads`.
      head_dim: H, width of a head; even, because rotary embedding rotates pairs.
      mlp_dim: F, width of the feed-forward layer, or of each expert.
      max_length: longest sequence that the model was trained on, in tokens.
      norm_eps: epsilon of the norms.
      rope_theta: base of the rotary embedding.
      rope_scaling: how its frequencies are scaled, or None.
      tied_head: whether the output head is the transposed embedding.
      initializer_range: standard deviation of random weights.
      bos_id: id that starts a sequence, if the model has one.
      eos_ids: ids that end a sequence; the first is `eos_id`.
      family: the `model_type` in its config.json; does not affect the computation.
      activation: of the feed-forward layer: "silu", "gelu" or "gelu_tanh".
      gated: whether the feed-forward layer has a gate: down(activation(gate(x)) · up(x)), else down(activation(up(x))).
      qkv_bias: whether queries, keys and values have biases.
      output_bias: whether attention's output projection has a bias.
      mlp_bias: whether the feed-forward layer's matrices have biases.
      qk_norm: whether queries and keys have an RMSNorm before they are rotated: "none"; "head", each head by itself; or
        "whole", all heads together.
      norm: "rms", or "layer" for LayerNorm with a bias.
      norm_offset: added to the scale of every norm; Gemma stores scales minus one.
      pre_norms: whether attention and feed-forward layer are preceded by norms.
      post_norms: whether they are followed by norms.
      parallel_residual: whether the feed-forward layer reads the input of attention's block, not its output.
      residual_scale: factor of what attention and feed-forward layer add to the residual stream.
      embed_scale: factor of the input embedding, rounded to the compute dtype.
      window: sliding window: keys that a query of a local layer sees, its own included; None if no layer is local.
      local_layers: for each layer, whether it is local; empty if all are alike: local if there is a window.
      local_rope_theta: base of the rotary embedding of local layers, which is not scaled; None for the same as other
        layers.
      rotary_dim: size of the first part of a head that is rotated; None for the whole head.
      query_pre_attn_scalar: scores are divided by its square root; None for `head_dim`.
      attention_scale: factor of the scores, in place of that; None for none.
      attention_softcap: scores become softcap · tanh(score / softcap) before masking; None leaves them.
      final_softcap: logits likewise.
      logits_divisor: logits are divided by it.
      num_experts: E, experts of each layer, of which every token passes through some; 0 for one feed-forward layer.
      experts_per_token: K, how many.
      shares_sum_to_one: whether a token's experts are weighted by their probabilities divided by the sum of these.
      balance_weight: the weight of the load-balancing loss that the model was trained with.
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
    rope_scaling: Scaling | None = None
    tied_head: bool = False
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    family: str = "llama"
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    parallel_residual: bool = False
    residual_scale: float = 1.0
    embed_scale: float = 1.0
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    query_pre_attn_scalar: int | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    logits_divisor: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    shares_sum_to_one: bool = False
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
        optional = tuple(name for name in ("window", "query_pre_attn_scalar") if getattr(self, name) is not None)
        optional += ("num_experts", "experts_per_token") if self.num_experts != 0 else ()
        for name in (*sizes, "max_length", *optional):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"The model has {name}={value!r}; it must be an integer of at least 1. Fix its config.json."
                )
        if self.num_layers > _MOST_LAYERS:
            raise ConfigError(
                f"The model has num_layers={self.num_layers}; at most {_MOST_LAYERS} are read. Fix its config.json."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"The model has num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}; the first must be a "
                "multiple of the second. Fix its config.json."
            )
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            given = f"head_dim={self.head_dim}" + (f" and rotary_dim={rotated}" if rotated != self.head_dim else "")
            raise ConfigError(
                f"The model has {given}; rotary embedding needs an even size from 2 to head_dim. Fix its config.json."
            )
        if isinstance(self.rope_scaling, LongRopeScaling):
            counts = {len(self.rope_scaling.short_factors), len(self.rope_scaling.long_factors)}
            if counts != {rotated // 2}:
                raise ConfigError(
                    f"The model's longrope scaling has {' and '.join(map(str, sorted(counts)))} factors; it needs one "
                    f"for each of the {rotated // 2} rotated pairs of a head. Fix its config.json."
                )
        for name in ("attention_softcap", "final_softcap", "attention_scale", "logits_divisor", "residual_scale"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
                raise ConfigError(f"The model has {name}={value!r}; it must be above 0, or null. Fix its config.json.")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"The model has experts_per_token={self.experts_per_token} of num_experts={self.num_experts}; a token "
                "passes through at most all of them. Fix its config.json."
            )
        assert len(self.local_layers) in (0, self.num_layers), "a kind for each layer, or none"
        assert not self.local_layers or self.window is not None, "local layers have a window"

    @property
    def eos_id(self) -> int | None:
        """The first of the ids that end a sequence; None if the model has none."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def layers_are_local(self) -> tuple[bool, ...]:
        """For each layer, whether it attends only within the window."""
        return self.local_layers or (self.window is not None,) * self.num_layers

    def num_params(self) -> int:
        """Number of parameters, norms and biases included; a tied head counts once."""
        return self._num_params(self.num_experts)

    def num_active_params(self) -> int:
        """Number of parameters that a token passes through: those of the other experts do not count."""
        return self._num_params(self.experts_per_token)

    def _num_params(self, experts: int) -> int:
        one_norm = self.embed_dim * (2 if self.norm == "layer" else 1)
        heads = {"none": 0, "head": 2, "whole": self.num_heads + self.num_kv_heads}[self.qk_norm]
        norms = 2 * (self.pre_norms + self.post_norms) * one_norm + heads * self.head_dim
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        biases += self.embed_dim if self.output_bias else 0
        biases += self.embed_dim + (2 if self.gated else 1) * self.mlp_dim if self.mlp_bias else 0
        tables = (1 if self.tied_head else 2) * self.vocab_size * self.embed_dim
        return one_norm + tables + self.num_layers * (norms + biases + self._layer_matmul_weights(experts))

    def flops_per_token(self, attended: float, *, attended_locally: float | None = None, head: bool = True) -> float:
        """FLOPs of one token's forward pass; a backward pass costs twice as much.

        Args:
          attended: tokens that it attends to, itself included: (L + 1) / 2 on average over a causal sequence.
          attended_locally: how many of them local layers see; None for the smaller of `attended` and the window. For an
            average over sequences longer than the window that is too many: pass the average of what each sees.
          head: whether to count the output head.

        Returns:
          FLOPs, with a multiply-add counted as two. Norms, rotations and softmax are not counted, as is customary.
        """
        if attended_locally is None:
            attended_locally = attended if self.window is None else min(attended, self.window)
        num_local = sum(self.layers_are_local)
        attention = 4.0 * self.num_heads * self.head_dim
        attention *= (self.num_layers - num_local) * attended + num_local * attended_locally
        matmuls = 2.0 * self.num_layers * self._layer_matmul_weights(self.experts_per_token)
        return matmuls + attention + (2.0 * self.embed_dim * self.vocab_size if head else 0.0)

    def _layer_matmul_weights(self, experts: int) -> int:
        """Weights of a layer's matrices, with those of this many experts if it has any."""
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        feed_forward = (3 if self.gated else 2) * self.embed_dim * self.mlp_dim
        return attention + (
            self.num_experts * self.embed_dim + experts * feed_forward if self.num_experts else feed_forward
        )
