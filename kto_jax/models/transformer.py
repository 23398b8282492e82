"""The decoder: parameters and forward pass of a Llama, in Flax NNX.

All layers are one `Block` whose parameters carry a leading axis "layers"; the forward pass scans over it. The
residual stream is kept flat, [T, D] with T = R L, because the weight gradients of a flat stream are plain matrix
products: on CPU this is 1.4 times as fast as a three-dimensional stream. Arrays are given a row axis only around
attention. Every parameter has the names of its axes in its metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kto_jax.models.attention import attention, rotary_tables, rotate
from kto_jax.models.config import TransformerConfig

Constrain = Callable[[Array, tuple[str, ...]], Array]
# As `dense_attention`: rotated queries and keys, and values, of packed rows, with their segments and positions.
PackedAttention = Callable[..., Array]
Cache = dict[str, Array]
# Takes rotated queries and keys, and values, [R, L, heads, H]; gives the mixed values and whatever must be kept.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """Full float32 products where float32 was asked for, also where the hardware would take a shorter type."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


class Linear(nnx.Module):
    """A projection, x @ weight. Every matrix product with a weight of a layer goes through here."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, scale: float, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)

    def __call__(self, x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Projects every row of x."""
        return jnp.dot(x_TI, self.weight[...].astype(self.dtype), precision=matmul_precision(self.dtype))


class RMSNorm(nnx.Module):
    """Scales every token to unit mean square, then by a learnt factor; in float32 or wider."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape), axes=axes)

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Normalises every row of x."""
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        x = x_TD.astype(wide)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(wide)[None, :]).astype(x_TD.dtype)


class Attention(nnx.Module):
    """Projections to queries, keys and values, rotation, and the projection back."""

    def __init__(self, config: TransformerConfig, *, dtype, constrain: Constrain, rngs: nnx.Rngs):
        self.head_dim, self.constrain = config.head_dim, constrain
        layers, embed = config.num_layers, config.embed_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        options: dict[str, Any] = {"scale": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.query = Linear((layers, embed, heads), ("layers", "embed", "heads"), **options)
        self.key = Linear((layers, embed, kv_heads), ("layers", "embed", "kv_heads"), **options)
        self.value = Linear((layers, embed, kv_heads), ("layers", "embed", "kv_heads"), **options)
        self.output = Linear((layers, heads, embed), ("layers", "heads", "embed"), **options)

    def __call__(self, x_TD: Array, tables: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        """Mixes values between tokens; `attend` decides which and what is kept."""
        rows, length = tables[0].shape[:2]

        def heads(x: Array, name: str) -> Array:
            return self.constrain(x.reshape(rows, length, -1, self.head_dim), ("rows", "length", name, "head_dim"))

        query = rotate(heads(self.query(x_TD), "heads"), tables)
        key = rotate(heads(self.key(x_TD), "kv_heads"), tables)
        mixed, kept = attend(query, key, heads(self.value(x_TD), "kv_heads"))
        return self.output(mixed.reshape(rows * length, -1)), kept


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        layers, embed, mlp = config.num_layers, config.embed_dim, config.mlp_dim
        options: dict[str, Any] = {"scale": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.gate = Linear((layers, embed, mlp), ("layers", "embed", "mlp"), **options)
        self.up = Linear((layers, embed, mlp), ("layers", "embed", "mlp"), **options)
        self.down = Linear((layers, mlp, embed), ("layers", "mlp", "embed"), **options)

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Passes every token through the feed-forward layer."""
        return self.down(jax.nn.silu(self.gate(x_TD)) * self.up(x_TD))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, dtype, constrain: Constrain, rngs: nnx.Rngs):
        norm_shape, norm_axes = (config.num_layers, config.embed_dim), ("layers", "embed")
        self.attention_norm = RMSNorm(norm_shape, norm_axes, eps=config.norm_eps)
        self.attention = Attention(config, dtype=dtype, constrain=constrain, rngs=rngs)
        self.mlp_norm = RMSNorm(norm_shape, norm_axes, eps=config.norm_eps)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x_TD: Array, tables: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        """The stream after this layer, and what `attend` keeps."""
        mixed_TD, kept = self.attention(self.attention_norm(x_TD), tables, attend)
        x_TD = x_TD + mixed_TD
        return x_TD + self.mlp(self.mlp_norm(x_TD)), kept


class Embedding(nnx.Module):
    """The table of token vectors."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.embed_dim)
        values = config.initializer_range * jax.random.normal(rngs.params(), shape)
        self.table = nnx.Param(values, axes=("vocab", "embed"))


class Transformer(nnx.Module):
    """The whole decoder; outside of models/ it is seen through `Model`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype,
        remat: str,
        constrain: Constrain,
        packed_attention: PackedAttention,
        has_head: bool,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat, self.constrain = config, dtype, remat, constrain
        self.packed_attention = packed_attention
        self.embed = Embedding(config, rngs=rngs)
        self.layers = Block(config, dtype=dtype, constrain=constrain, rngs=rngs)
        self.final_norm = RMSNorm((config.embed_dim,), ("embed",), eps=config.norm_eps)
        if has_head:
            shape = (config.embed_dim, config.vocab_size)
            self.head = Linear(shape, ("embed", "vocab"), scale=config.initializer_range, dtype=dtype, rngs=rngs)

    def hidden_states(
        self, tokens_RL: Int[Array, "R L"], segment_ids_RL: Int[Array, "R L"], positions_RL: Int[Array, "R L"]
    ) -> Float[Array, "R L D"]:
        """Hidden states after the final norm, in the compute dtype; those of padding mean nothing."""
        tables, precision = self._tables(positions_RL), matmul_precision(self.dtype)

        def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
            tokens = {"segment_ids_RL": segment_ids_RL, "positions_RL": positions_RL}
            return self.packed_attention(query, key, value, **tokens, precision=precision), None

        graphdef, state = nnx.split(self.layers)

        def layer(x_TD: Array, state) -> tuple[Array, None]:
            x_TD, _ = nnx.merge(graphdef, state)(self._pin(x_TD, tokens_RL.shape), tables, attend)
            return x_TD, None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x_TD, _ = jax.lax.scan(layer, self._embedded(tokens_RL), state)
        return self._finish(x_TD, tokens_RL.shape)

    def decode(
        self, cache: Cache, tokens_BL: Int[Array, "B L"], positions_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """One step of generation, or the reading of a prompt: see `Model.decode`."""
        batch, slots = cache["key"].shape[1:3]
        tables, precision = self._tables(positions_BL), matmul_precision(self.dtype)
        row_B1 = jnp.arange(batch)[:, None]
        # Padding is written past the end of the cache, where a scatter drops it.
        slot_BL = jnp.where(positions_BL < 0, slots, positions_BL)
        slots_BS = jnp.broadcast_to(jnp.arange(slots)[None], (batch, slots))
        graphdef, state = nnx.split(self.layers)

        # The cache is carried, not scanned over: the loop then writes it in place, a few tokens at a time.
        def layer(carry, scanned):
            x_TD, keys, values = carry
            index, state = scanned

            def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
                written = (index, row_B1, slot_BL)
                new_keys = keys.at[written].set(key, mode="drop")
                new_values = values.at[written].set(value, mode="drop")
                mixed = attention(
                    query, new_keys[index], new_values[index], query_places_RL=positions_BL, key_places_RS=slots_BS,
                    query_segments_RL=jnp.zeros_like(positions_BL), key_segments_RS=jnp.zeros_like(slots_BS),
                    precision=precision,
                )  # fmt: skip
                return mixed, (new_keys, new_values)

            x_TD, (new_keys, new_values) = nnx.merge(graphdef, state)(self._pin(x_TD, tokens_BL.shape), tables, attend)
            return (x_TD, new_keys, new_values), None

        start = (self._embedded(tokens_BL), cache["key"], cache["value"])
        (x_TD, keys, values), _ = jax.lax.scan(layer, start, (jnp.arange(self.config.num_layers), state))
        return self._finish(x_TD, tokens_BL.shape), {"key": keys, "value": values}

    def _tables(self, positions_RL: Array) -> tuple[Array, Array]:
        return rotary_tables(positions_RL, self.config, jnp.promote_types(self.dtype, jnp.float32))

    def _embedded(self, tokens_RL: Array) -> Array:
        # `take` fills ids outside of the vocabulary with NaN, which the step's guard sees; indexing would clamp them.
        return jnp.take(self.embed.table[...], tokens_RL.reshape(-1), axis=0).astype(self.dtype)

    def _pin(self, x_TD: Array, shape: tuple[int, ...]) -> Array:
        return self.constrain(x_TD.reshape(*shape, -1), ("rows", "length", "embed")).reshape(x_TD.shape)

    def _finish(self, x_TD: Array, shape: tuple[int, ...]) -> Array:
        return self.constrain(self.final_norm(x_TD).reshape(*shape, -1), ("rows", "length", "embed"))
