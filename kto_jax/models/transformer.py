"""The decoder's parameters and forward pass in Flax NNX, for Llama and for families that differ by a few options.

All layers are one `Block` whose parameters have a leading axis "layers"; the forward pass scans over it. The residual
stream is flat, [T, D] with T = R L, because the weight gradients of a flat stream are plain matmuls: on CPU this is 1.4
times as fast as a three-dimensional stream. Arrays have a row axis only around attention. Every parameter's metadata
names its logical axes.

A flag, scanned over with the parameters, distinguishes layers with a sliding window from layers that see all keys. If
all layers are alike, there is no flag and no branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kto_jax.models.attention.dense import rotary_tables, rotate, sequence_lengths
from kto_jax.models.config import TransformerConfig
from kto_jax.models.experts import ExpertFeedForward
from kto_jax.models.gradients import repeat_rows, table_rows, wide_gradient_product
from kto_jax.models.int8 import Int8Matrix
from kto_jax.models.layout import Layout
from kto_jax.models.lora import AdaptedMatrix, DoraAdapter
from kto_jax.models.quantised import QuantisedMatrix
from kto_jax.models.rope import LengthDependent
from kto_jax.models.unstacked import TransposedMatrix, product_with_transposed
from kto_jax.shapes import RouterSums

Cache = dict[str, tuple[Array, ...]]  # keys and values of each layer
CACHE_AXES = ("rows", "kv_heads", "slots", "head_dim")
Tables = tuple[Array, Array]  # cosine and sine
# Takes rotated queries and keys, and values, [R, L, heads, H]; returns attention's output and the updated KV cache, if
# any.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

_LAYER_INPUT = "layer_input"
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    # As "full", with each layer's input in host memory until the backward pass reaches the layer.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """Full float32 matmuls for float32, where GPU and TPU would use a narrower type by default."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


class Linear(nnx.Module):
    """A projection, x @ weight (+ bias). Every matmul with a layer's weight goes through here."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        scale: float,
        dtype,
        rngs: nnx.Rngs,
        reduce_dtype: str = "float32",
        has_bias: bool = False,
    ):
        self.dtype = dtype
        self.has_wide_gradient = dtype == jnp.bfloat16 and reduce_dtype == "float32"
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1])), axes=(*axes[:-2], axes[-1])) if has_bias else None

    def __call__(self, x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Projects every row of x."""
        weight = self.weight[...]
        x_TO = self._adapted(x_TI, weight) if isinstance(weight, AdaptedMatrix) else self._product(x_TI, weight)
        return x_TO if self.bias is None else x_TO + repeat_rows(self.bias[...], len(x_TO), self.dtype)

    def _adapted(self, x_TI: Array, weight: AdaptedMatrix) -> Array:
        whole_TO, dropped_TI = self._product(x_TI, weight.frozen), weight.dropped(x_TI)
        added_TO = self._product(self._product(dropped_TI, weight.a), weight.scaled_b)
        if not isinstance(weight.adapter, DoraAdapter):
            return whole_TO + added_TO
        # As in peft, the change of the norm applies to what is not dropped.
        again_TO = whole_TO if dropped_TI is x_TI else self._product(dropped_TI, weight.frozen)
        gain = weight.gain()
        grown_TO = repeat_rows(gain - 1, len(x_TI), self.dtype) * again_TO
        return whole_TO + grown_TO + repeat_rows(gain, len(x_TI), self.dtype) * added_TO

    def _product(self, x_TI: Array, weight: Array | QuantisedMatrix | TransposedMatrix) -> Array:
        if isinstance(weight, TransposedMatrix):
            product = partial(jnp.dot, precision=matmul_precision(self.dtype))
            return product_with_transposed(product, x_TI, weight.values.astype(self.dtype))
        if self.has_wide_gradient and not isinstance(weight, QuantisedMatrix):
            return wide_gradient_product(x_TI, weight)
        return jnp.dot(x_TI, weight.astype(self.dtype), precision=matmul_precision(self.dtype))


class RMSNorm(nnx.Module):
    """RMSNorm with a learnt scale, computed in float32 or wider."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, eps: float, offset: float):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset), axes=axes)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises along the last axis of x."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = self.scale[...].astype(wide)[(None,) * (x.ndim - 1)]
        scale = scale if self.offset == 0 else scale + self.offset
        scaled = x.astype(wide)
        scaled = scaled * jax.lax.rsqrt(jnp.mean(jnp.square(scaled), axis=-1, keepdims=True) + self.eps)
        return (scaled * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with a learnt scale and bias, computed in float32 or wider."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape), axes=axes)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises along the last axis of x."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale, bias = (leaf[...].astype(wide)[(None,) * (x.ndim - 1)] for leaf in (self.scale, self.bias))
        centred = x.astype(wide)
        centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normal * scale + bias).astype(x.dtype)


def _linear_options(config: TransformerConfig, dtype: Any, layout: Layout, rngs: nnx.Rngs) -> dict[str, Any]:
    return {
        "scale": config.initializer_range,
        "dtype": dtype,
        "reduce_dtype": layout.reduce_dtype,
        "rngs": rngs,
    }


def _rms_norm(config: TransformerConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> RMSNorm:
    return RMSNorm(shape, axes, eps=config.norm_eps, offset=config.norm_offset)


def _norm(config: TransformerConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> RMSNorm | LayerNorm:
    """A norm of the residual stream."""
    return LayerNorm(shape, axes, eps=config.norm_eps) if config.norm == "layer" else _rms_norm(config, shape, axes)


class Attention(nnx.Module):
    """Projections to queries, keys and values, optional norms, rotation, attention, and the output projection."""

    def __init__(self, config: TransformerConfig, *, dtype, layout: Layout, rngs: nnx.Rngs):
        self.head_dim, self.constrain = config.head_dim, layout.constrain
        layers, embed = config.num_layers, config.embed_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        options = _linear_options(config, dtype, layout, rngs)
        biased = options | {"has_bias": config.qkv_bias}
        self.query = Linear((layers, embed, heads), ("layers", "embed", "heads"), **biased)
        self.key = Linear((layers, embed, kv_heads), ("layers", "embed", "kv_heads"), **biased)
        self.value = Linear((layers, embed, kv_heads), ("layers", "embed", "kv_heads"), **biased)
        self.norms_whole = config.qk_norm == "whole"
        self.query_norm, self.key_norm = (
            None if config.qk_norm == "none"
            else _rms_norm(config, (layers, width), ("layers", axis)) if self.norms_whole
            else _rms_norm(config, (layers, config.head_dim), ("layers", "head_dim"))
            for width, axis in ((heads, "heads"), (kv_heads, "kv_heads"))
        )  # fmt: skip
        biased = options | {"has_bias": config.output_bias}
        self.output = Linear((layers, heads, embed), ("layers", "heads", "embed"), **biased)

    def __call__(self, x_TD: Array, tables: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        """The attention block's output, and what `attend` returns besides its own output."""
        rows, length = tables[0].shape[:2]

        def heads(x: Array, name: str) -> Array:
            return self.constrain(x.reshape(rows, length, -1, self.head_dim), ("rows", "length", name, "head_dim"))

        def project(linear: Linear, norm: RMSNorm | None, name: str) -> Array:
            x = linear(x_TD)
            x = heads(norm(x) if norm is not None and self.norms_whole else x, name)
            return x if norm is None or self.norms_whole else norm(x)

        query, key = project(self.query, self.query_norm, "heads"), project(self.key, self.key_norm, "kv_heads")
        mixed, kept = attend(rotate(query, tables), rotate(key, tables), heads(self.value(x_TD), "kv_heads"))
        return self.output(mixed.reshape(rows * length, -1)), kept


class FeedForward(nnx.Module):
    """A gated layer, down(activation(gate(x)) * up(x)): SwiGLU if the activation is silu; or one without gate."""

    def __init__(self, config: TransformerConfig, *, dtype, layout: Layout, rngs: nnx.Rngs):
        layers, embed, mlp = config.num_layers, config.embed_dim, config.mlp_dim
        options = _linear_options(config, dtype, layout, rngs) | {"has_bias": config.mlp_bias}
        self.activation = config.activation
        gate = Linear((layers, embed, mlp), ("layers", "embed", "mlp"), **options) if config.gated else None
        self.gate: Linear | None = gate
        self.up = Linear((layers, embed, mlp), ("layers", "embed", "mlp"), **options)
        self.down = Linear((layers, mlp, embed), ("layers", "mlp", "embed"), **options)

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Passes every token through the feed-forward layer."""
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activate(self.up(x_TD)))
        return self.down(activate(self.gate(x_TD)) * self.up(x_TD))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with norms before or after it and a residual connection."""

    def __init__(self, config: TransformerConfig, *, dtype, layout: Layout, rngs: nnx.Rngs):
        norm = partial(_norm, config, (config.num_layers, config.embed_dim), ("layers", "embed"))
        self.residual_scale, self.is_parallel = config.residual_scale, config.parallel_residual
        self.attention_norm: RMSNorm | LayerNorm | None = norm() if config.pre_norms else None
        self.attention = Attention(config, dtype=dtype, layout=layout, rngs=rngs)
        self.mlp_norm: RMSNorm | LayerNorm | None = norm() if config.pre_norms else None
        self.mlp: FeedForward | ExpertFeedForward
        if config.num_experts:
            activation = ACTIVATIONS[config.activation]
            self.mlp = ExpertFeedForward(config, activation=activation, dtype=dtype, layout=layout, rngs=rngs)
        else:
            self.mlp = FeedForward(config, dtype=dtype, layout=layout, rngs=rngs)
        self.attention_post_norm: RMSNorm | LayerNorm | None = norm() if config.post_norms else None
        self.mlp_post_norm: RMSNorm | LayerNorm | None = norm() if config.post_norms else None

    def __call__(
        self, x_TD: Array, tables: tuple[Array, Array], attend: Attend, where_RL: Bool[Array, "R L"]
    ) -> tuple[Array, Any, RouterSums | None]:
        """The residual stream after this layer, what `attend` returns besides its output, and what the router did.

        Args:
          x_TD: the residual stream.
          tables: of the rotary embedding.
          attend: attention.
          where_RL: which tokens are not padding.
        """
        mixed_TD, kept = self.attention(_normalised(self.attention_norm, x_TD), tables, attend)
        after_TD = x_TD + self._scaled(_normalised(self.attention_post_norm, mixed_TD))
        normal_TD, routed = _normalised(self.mlp_norm, x_TD if self.is_parallel else after_TD), None
        if isinstance(self.mlp, ExpertFeedForward):
            fed_TD, routed = self.mlp(normal_TD, where_RL)
        else:
            fed_TD = self.mlp(normal_TD)
        return after_TD + self._scaled(_normalised(self.mlp_post_norm, fed_TD)), kept, routed

    def _scaled(self, x_TD: Array) -> Array:
        return x_TD if self.residual_scale == 1 else x_TD * jnp.asarray(self.residual_scale, x_TD.dtype)


def _normalised(norm: RMSNorm | LayerNorm | None, x_TD: Array) -> Array:
    return x_TD if norm is None else norm(x_TD)


def _lookup(table: Array | Int8Matrix, tokens_T: Int[Array, " T"]) -> Float[Array, "T D"]:
    return table.rows(tokens_T) if isinstance(table, Int8Matrix) else table_rows(table, tokens_T)


class Embedding(nnx.Module):
    """The token embedding."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.embed_dim)
        values = config.initializer_range * jax.random.normal(rngs.params(), shape)
        self.table = nnx.Param(values, axes=("vocab", "embed"))


def _layer_tables(tables: tuple[Tables, Tables], is_local: Array | None) -> Tables:
    """The rotary tables of a layer, from those of global and of local layers."""
    shared, local = tables
    if is_local is None or local is shared:
        return shared
    return jnp.where(is_local, local[0], shared[0]), jnp.where(is_local, local[1], shared[1])


class Transformer(nnx.Module):
    """The whole decoder; code outside models/ uses it through `Model`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype,
        remat: str,
        layout: Layout,
        has_head: bool,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        self.constrain, self.packed_attention = layout.constrain, layout.attention
        self.cached_attention = layout.cached_attention
        self.embed = Embedding(config, rngs=rngs)
        self.layers = Block(config, dtype=dtype, layout=layout, rngs=rngs)
        self.final_norm = _norm(config, (config.embed_dim,), ("embed",))
        if has_head:
            shape = (config.embed_dim, config.vocab_size)
            self.head = Linear(shape, ("embed", "vocab"), scale=config.initializer_range, dtype=dtype, rngs=rngs)

    def hidden_states(
        self, tokens_RL: Int[Array, "R L"], segment_ids_RL: Int[Array, "R L"], positions_RL: Int[Array, "R L"]
    ) -> tuple[Float[Array, "R L D"], RouterSums | None]:
        """Hidden states after the final norm, in the compute dtype, and what the routers of all layers did, if any.

        The hidden states of padding are meaningless.
        """
        tables = self._tables(positions_RL, segment_ids_RL)
        packed = partial(self.packed_attention, segment_ids_RL=segment_ids_RL, positions_RL=positions_RL)
        graphdef, state = nnx.split(self.layers)

        def layer(x_TD: Array, scanned) -> tuple[Array, RouterSums | None]:
            is_local, state = scanned

            def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
                return self._attend(packed, is_local, key.shape[1], query, key, value), None

            block = nnx.merge(graphdef, state)
            x_TD = checkpoint_name(self._constrain(x_TD, tokens_RL.shape), _LAYER_INPUT)
            x_TD, _, routed = block(x_TD, _layer_tables(tables, is_local), attend, segment_ids_RL > 0)
            return x_TD, routed

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x_TD, routed = jax.lax.scan(layer, self._embed(tokens_RL), (self._is_local(), state))
        return self._final_hidden(x_TD, tokens_RL.shape), routed

    def decode(
        self, layers: Sequence[Any], cache: Cache, tokens_BL: Int[Array, "B L"], positions_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """A decoding step, or a chunk of a prompt: see `Model.decode`. `layers` holds each layer's parameters.

        The loop over layers is unrolled. A scan would copy each layer's weights and cache in every step on CPU.
        """
        tables = self._tables(positions_BL)
        graphdef, _ = nnx.split(self.layers)
        x_TD, caches = self._embed(tokens_BL), []
        per_layer = zip(layers, self.config.layers_are_local, cache["key"], cache["value"], strict=True)
        for state, is_local, *kept in per_layer:
            attend = partial(self._attend_cached, positions_BL, is_local, kept)
            block = nnx.merge(graphdef, nnx.State(state))
            x_TD = self._constrain(x_TD, tokens_BL.shape)
            x_TD, kept, _ = block(x_TD, tables[int(is_local)], attend, positions_BL >= 0)
            caches.append(kept)
        keys, values = zip(*caches, strict=True)
        return self._final_hidden(x_TD, tokens_BL.shape), {"key": keys, "value": values}

    def _attend_cached(
        self, positions_BL: Array, is_local: bool, kept: Sequence[Array], query: Array, key: Array, value: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """Writes keys and values [B, L, K, H] to a layer's cache, and attends over it."""
        num_slots = kept[0].shape[2]
        # Padding's slot is past the end of the cache, where the scatter drops it. Heads are indexed too: a scatter of
        # all heads at once has a layout of its own on TPU, and the cache would be copied in every step.
        row_B11 = jnp.arange(len(positions_BL))[:, None, None]
        head_1K1 = jnp.arange(kept[0].shape[1])[None, :, None]
        slot_B1L = jnp.where(positions_BL < 0, num_slots, positions_BL)[:, None, :]
        keys, values = (
            self.constrain(old.at[row_B11, head_1K1, slot_B1L].set(jnp.moveaxis(new, 2, 1), mode="drop"), CACHE_AXES)
            for old, new in zip(kept, (key, value), strict=True)
        )
        cached = partial(self.cached_attention, positions_BL=positions_BL)
        return self._attend(cached, is_local, num_slots, query, keys, values), (keys, values)

    def _is_local(self) -> Array | None:
        """For each layer, whether it is local; None if all are alike."""
        local = self.config.layers_are_local
        return None if len(set(local)) == 1 else jnp.array(local)

    def _tables(self, positions_RL: Array, segment_ids_RL: Array | None = None) -> tuple[Tables, Tables]:
        """Rotary tables of global and of local layers, which most models share."""
        config, scaling = self.config, self.config.rope_scaling
        wide, lengths_RL = jnp.promote_types(self.dtype, jnp.float32), None
        is_long = isinstance(scaling, LengthDependent) and positions_RL.shape[1] > scaling.original_max_length
        if is_long and segment_ids_RL is not None:
            lengths_RL = sequence_lengths(positions_RL, segment_ids_RL)
        shared = rotary_tables(positions_RL, config, wide, local=all(config.layers_are_local), lengths_RL=lengths_RL)
        if self._is_local() is None or config.local_rope_theta is None:
            return shared, shared
        return shared, rotary_tables(positions_RL, config, wide, local=True)

    def _attend(
        self, attention: Callable[..., Array], is_local: Array | bool | None, num_keys: int, *heads: Array
    ) -> Array:
        """Calls `attention` with this layer's window; `is_local` is None if all layers are alike."""
        config = self.config
        scalar, scale = config.query_pre_attn_scalar, config.attention_scale
        attend = partial(
            attention, softcap=config.attention_softcap, scale=scale if scalar is None else scalar**-0.5,
            precision=matmul_precision(self.dtype),
        )  # fmt: skip
        if config.window is None or num_keys <= config.window:  # such a window masks no key
            return attend(*heads)
        within = partial(attend, window=config.window)
        if isinstance(is_local, bool):
            return within(*heads) if is_local else attend(*heads)
        return within(*heads) if is_local is None else jax.lax.cond(is_local, within, attend, *heads)

    def _embed(self, tokens_RL: Array) -> Array:
        x_TD = _lookup(self.embed.table[...], tokens_RL.reshape(-1)).astype(self.dtype)
        # Sharded as the table is: each device looks up its part of the vectors. They are then resharded by all-to-all,
        # not all-gather, one mesh axis after the other.
        x_TD = self.constrain(x_TD, ("looked_up", "table_embed"))
        x_RLD = self.constrain(x_TD.reshape(*tokens_RL.shape, -1), ("looked_up", "length", "half_embed"))
        x_TD = self._constrain(x_RLD.reshape(x_TD.shape), tokens_RL.shape)
        scale = self.config.embed_scale
        return x_TD if scale == 1 else x_TD * jnp.asarray(scale, self.dtype)

    def _constrain(self, x_TD: Array, shape: tuple[int, ...]) -> Array:
        return self.constrain(x_TD.reshape(*shape, -1), ("rows", "length", "embed")).reshape(x_TD.shape)

    def _final_hidden(self, x_TD: Array, shape: tuple[int, ...]) -> Array:
        return self.constrain(self.final_norm(x_TD).reshape(*shape, -1), ("rows", "length", "embed"))
