"""The interface of a model: pure functions of a nested dictionary of parameters."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.losses import token_logps
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.heads import (
    SCALAR_HEAD,
    SCALAR_HEADS,
    TOWER,
    apply_scalar_head,
    init_scalar_head,
    scalar_head_axes,
)
from kto_jax.models.int8 import Int8Matrix
from kto_jax.models.layout import ONE_DEVICE, Layout
from kto_jax.models.lora import merge_adapters
from kto_jax.models.quantised import QUANTISED, cast_params, quantised_axes
from kto_jax.models.rope import LengthDependent
from kto_jax.models.transformer import CACHE_AXES, REMAT_POLICIES, Cache, Transformer, matmul_precision
from kto_jax.models.unstacked import product_with_transposed
from kto_jax.shapes import RouterSums

Params = dict[str, Any]
DTYPES = ("float32", "bfloat16", "float64")
_TRUNK = ("embed", "layers", "final_norm")


def _parts(x: Array, parts: int) -> Array:
    """[R, C, ...] -> [R · parts, C / parts, ...], padded if `parts` does not divide C."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % parts)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0] * parts, -1, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its parameters: hashable, so that it can be a static argument of `jax.jit`.

    Parameters are a nested dictionary of arrays; weights are stored as [in, out], stacked over layers:

        embed.table [V, D]            layers.attention_norm.scale, layers.mlp_norm.scale [layers, D]
        final_norm.scale [D]          layers.attention.query, key, value, output .weight [layers, in, out]
        head.weight [D, V] if untied  layers.mlp.gate, up, down .weight [layers, in, out]
        where the architecture has    .bias of each of these norms [layers, D] and matrices [layers, out]
        them:                         layers.attention.query_norm, key_norm .scale [layers, H] or [layers, heads · H]
                                      layers.attention_post_norm, mlp_post_norm .scale [layers, D]
        a mixture of experts:         layers.mlp.router.weight [layers, D, E]
                                      layers.mlp.gate, up, down .weight [layers, E, in, out]
        scorer, see heads.py          (the scalar head; a reward model has no output head)

    In place of a weight or table, a frozen reference may hold a quantised matrix (quantised.py), and a LoRA policy
    an `AdaptedMatrix` (lora.py).

    A function's parameters may lack what it does not read, and may hold more: a frozen reference has no scalar head.

    Attributes:
      config: the architecture.
      dtype: compute dtype of the forward pass.
      remat: activation checkpointing of layers. "none": recompute nothing. "dots": save matmul outputs. "full": save
        only each layer's input. "offload": as "full", with those inputs in host memory.
      scalar_head: the head that maps a hidden state to one number: "none", "reward" or "value".
      graphdef: the structure of the NNX module, without output head and scalar head.
      layout: how activations are sharded.
      lora: how adapters are trained, with matrices by their own names (see `resolve_lora`); None if all parameters are
        trained.
      value_tower: whether the value head reads a trunk of its own.
    """

    config: TransformerConfig
    dtype: str
    remat: str
    scalar_head: str
    graphdef: Any = dataclasses.field(compare=False, repr=False)
    layout: Layout = ONE_DEVICE
    lora: LoraConfig | None = None
    value_tower: bool = False

    @classmethod
    def create(
        cls,
        config: TransformerConfig,
        *,
        dtype: str = "float32",
        remat: Literal["none", "dots", "full", "offload"] = "full",
        scalar_head: Literal["none", "reward", "value"] = "none",
        layout: Layout = ONE_DEVICE,
        lora: LoraConfig | None = None,
        value_tower: bool = False,
    ) -> Model:
        """Builds a model.

        Args:
          config: the architecture.
          dtype: "float32", "bfloat16" or, with x64 enabled, "float64".
          remat: activation checkpointing of layers.
          scalar_head: a linear reward head, a value head of three layers, or none.
          layout: how activations are sharded.
          lora: how adapters are trained; None for a model without adapters.
          value_tower: whether the value head reads a trunk of its own.

        Raises:
          ConfigError: unknown dtype, remat policy or scalar head, or a reward head on a family without one.
        """
        options = (
            ("dtype", dtype, DTYPES),
            ("remat", remat, tuple(REMAT_POLICIES)),
            ("scalar_head", scalar_head, SCALAR_HEADS),
        )
        for name, value, allowed in options:
            if value not in allowed:
                raise ConfigError(
                    f"model.{name}={value!r} is unknown; it may be {', '.join(allowed)}. Set one of these."
                )
        if scalar_head == "reward" and FAMILIES[config.family].classifier is None:
            raise ConfigError(
                f"A reward model of family {config.family!r} was asked for; transformers has no sequence classifier of "
                "it, so the result could not be exported. Families with one: "
                f"{', '.join(name for name, family in FAMILIES.items() if family.classifier)}. Choose another base."
            )
        model = cls(config, dtype, remat, scalar_head, None, layout, lora, value_tower)
        abstract = nnx.eval_shape(lambda: model._transformer(jax.random.key(0), has_head=False))
        return dataclasses.replace(model, graphdef=nnx.split(abstract)[0])

    def merge_adapters(self, trained: Params, frozen: Params, key: Key[Array, ""] | None = None) -> Params:
        """The policy's parameters: `trained` itself, or the frozen parameters with the trained adapters.

        Args:
          trained: what is trained.
          frozen: the parameters that adapters are added to.
          key: PRNG key of the adapters' dropout; None for none.
        """
        return trained if self.lora is None else merge_adapters(frozen, trained, self.lora, key)

    def hidden_states(
        self,
        params: Params,
        tokens_RL: Int[Array, "R L"],
        segment_ids_RL: Int[Array, "R L"],
        positions_RL: Int[Array, "R L"],
    ) -> Float[Array, "R L D"]:
        """Hidden states of packed rows, after the final norm.

        Args:
          params: parameters of this model.
          tokens_RL: token ids; an id outside the vocabulary makes every state that depends on it NaN.
          segment_ids_RL: attention stays inside a segment; 0 is padding.
          positions_RL: position of every token inside its segment, from 0.

        Returns:
          Hidden states in the compute dtype. Those of padding are finite but meaningless.
        """
        return self.route(params, tokens_RL, segment_ids_RL, positions_RL)[0]

    def route(
        self,
        params: Params,
        tokens_RL: Int[Array, "R L"],
        segment_ids_RL: Int[Array, "R L"],
        positions_RL: Int[Array, "R L"],
    ) -> tuple[Float[Array, "R L D"], RouterSums | None]:
        """`hidden_states`, and for a mixture of experts what the routers of all layers did."""
        return self._merge(params).hidden_states(tokens_RL, segment_ids_RL, positions_RL)

    def head(self, params: Params) -> Float[Array, "D V"]:
        """The output head in the compute dtype; the transposed embedding if they are tied.

        Its products are logits only without a soft-cap and divisor: `logits` and `token_logps` apply them.
        """
        if self.config.tied_head:
            return params["embed"]["table"].astype(self.dtype).T
        return params["head"]["weight"].astype(self.dtype)

    def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of a few hidden states, in float32 or wider, with the soft-cap; training never materialises them."""
        hidden = self._divided(hidden)
        wide, precision = jnp.promote_types(self.dtype, jnp.float32), matmul_precision(self.dtype)
        product = partial(jnp.dot, precision=precision, preferred_element_type=wide)
        if self.config.tied_head and hidden.ndim == 2 and len(hidden) > 1:
            swapped, plain = partial(product_with_transposed, product), lambda x, table: product(x, table.T)
            logits = jax.lax.platform_dependent(hidden, self.head(params).T, cpu=swapped, default=plain)
        else:
            logits = product(hidden, self.head(params))
        softcap = self.config.final_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def token_logps(
        self, params: Params, hidden: Float[Array, "*R T D"], targets: Int[Array, "*R T"]
    ) -> Float[Array, "*R T"]:
        """Log-probability of each target in nats, a chunk of logits at a time: see losses/logprobs.py."""
        tied = self.config.tied_head
        head = params["embed"]["table"] if tied else params["head"]["weight"]
        if isinstance(head, Int8Matrix) or (self.layout.num_devices > 1 and self.layout.reduce_dtype == "bfloat16"):
            head = head.astype(self.dtype)  # and so is its gradient, before the sum over devices
        # Resharded once, before the loop over chunks: all-gathered over fsdp, sharded over tensor.
        axes = ("vocab", "embed") if tied else ("embed", "vocab")
        shape, hidden = targets.shape, self._divided(hidden)
        if self.layout.row_parts > 1:
            # Parts of rows become rows, so that all devices that hold them work on every chunk.
            hidden, targets = _parts(hidden, self.layout.row_parts), _parts(targets, self.layout.row_parts)
        logps = token_logps(
            hidden, head, targets,
            head_axes="vd" if tied else "dv", softcap=self.config.final_softcap, num_devices=self.layout.num_devices,
            kept_logits=self.layout.kept_logits, constrain_head=lambda head: self.layout.constrain(head, axes),
        )  # fmt: skip
        return logps if self.layout.row_parts == 1 else logps.reshape(shape[0], -1)[:, : shape[1]]

    def _divided(self, hidden: Array) -> Array:
        """Hidden states whose products with the head are logits."""
        divisor = self.config.logits_divisor
        return hidden if divisor == 1 else hidden / jnp.asarray(divisor, hidden.dtype)

    def apply_scalar_head(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """The reward or the value of each hidden state, in float32 or wider.

        The gradient flows into the hidden states; to train a value head, pass `jax.lax.stop_gradient(hidden)`.

        Args:
          params: parameters with a scalar head of this model's kind.
          hidden: hidden states after the final norm. The reward of a sequence is read at its last token, the EOS.
        """
        assert self.scalar_head != "none", "this model was created without a scalar head"
        head = {name: part for name, part in params[SCALAR_HEAD].items() if name != TOWER}
        return apply_scalar_head(self.scalar_head, head, hidden)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty KV cache: keys and values [batch, K, length, H] of each layer in the compute dtype, sharded.

        Raises:
          ConfigError: the rotary scaling depends on the length, and `length` exceeds its original context.
        """
        config = self.config
        scaling = config.rope_scaling
        if isinstance(scaling, LengthDependent) and length > scaling.original_max_length:
            raise ConfigError(
                f"A KV cache of {length} tokens was asked for; the model's rotary scaling changes all of its "
                f"frequencies when a sequence exceeds {scaling.original_max_length} tokens, and cached keys cannot "
                f"follow. Prompt and completion may have {scaling.original_max_length} tokens together. Lower "
                "max_new_tokens, or shorten the prompts."
            )
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        empty = lambda: self.layout.constrain(jnp.zeros(shape, self.dtype), CACHE_AXES)  # noqa: E731
        return {name: tuple(empty() for _ in range(config.num_layers)) for name in ("key", "value")}

    def decode(
        self, params: Params, cache: Cache, tokens_BL: Int[Array, "B L"], positions_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Writes tokens to the KV cache and returns their hidden states: prefills a prompt, or decodes token by token.

        Keys and values are written at the tokens' positions. A token attends to every cached position up to its own,
        so positions must be filled from 0 without gaps; the order of tokens in the row does not matter. A long prompt
        is prefilled in chunks, because every chunk holds scores of all its tokens by all slots.

        Args:
          params: parameters of this model, stacked over layers, or from `unstack_layers` or `transpose_layers`.
          cache: from `init_cache` or the last call; donate it.
          tokens_BL: token ids.
          positions_BL: position of every token; -1 is padding, which is neither written nor attended to.

        Returns:
          Hidden states after the final norm (finite but meaningless for padding), and the cache.
        """
        layers = params["layers"]
        if not isinstance(layers, tuple):
            layers = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(self.config.num_layers))
        return self._merge(params | {"layers": layers[0]}).decode(layers, cache, tokens_BL, positions_BL)

    def init_params(self, key: Key[Array, ""], param_dtype: str) -> Params:
        """Random parameters: normal with the config's standard deviation, norms at one; scalar heads: see heads.py."""
        params = nnx.to_pure_dict(nnx.state(self._transformer(key, has_head=self._has_head)))
        if self.scalar_head != "none":
            # From a separate key, so that the head does not change the trunk's values.
            params[SCALAR_HEAD] = init_scalar_head(self.scalar_head, self.config, jax.random.fold_in(key, 1))
            if self.value_tower:
                params[SCALAR_HEAD][TOWER] = {name: params[name] for name in _TRUNK}
        return cast_params(params, param_dtype)

    def abstract_params(self, param_dtype: str) -> Params:
        """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`."""
        return jax.eval_shape(lambda key: self.init_params(key, param_dtype), jax.random.key(0))

    def logical_axes(self, param_dtype: str = "float32") -> dict[str, Any]:
        """The parameters' logical axes: a tuple of names for each leaf, one per axis.

        "heads" and "kv_heads" are axes of heads times head_dim; a mesh axis must divide the number of heads.
        """
        build = lambda: self._transformer(jax.random.key(0), has_head=self._has_head)  # noqa: E731
        variables = nnx.state(nnx.eval_shape(build))
        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        axes = jax.tree.map(lambda variable: variable.get_metadata("axes"), variables, is_leaf=is_variable)
        axes = nnx.to_pure_dict(axes)
        if self.scalar_head != "none":
            tower = {TOWER: {name: axes[name] for name in _TRUNK}} if self.value_tower else {}
            axes[SCALAR_HEAD] = scalar_head_axes(self.scalar_head) | tower
        return quantised_axes(axes, param_dtype) if param_dtype in QUANTISED else axes

    @property
    def _has_head(self) -> bool:
        return not self.config.tied_head and self.scalar_head != "reward"

    def _merge(self, params: Params) -> Transformer:
        trunk = {name: params[name] for name in _TRUNK}
        return nnx.merge(self.graphdef, nnx.State(trunk))

    def _transformer(self, key: Array, *, has_head: bool) -> Transformer:
        return Transformer(
            self.config,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            layout=self.layout,
            has_head=has_head,
            rngs=nnx.Rngs(params=key),
        )
