"""Log-probabilities of tokens, a chunk of logits at a time, and their sums over examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Logits that exist at a time on a device: 2**25 float32 values are 128 MiB.
_MAX_LOGITS = 2**25
# Logits that a device of unknown memory keeps from the forward for the backward pass: as many as exist at a time.
KEPT_LOGITS = _MAX_LOGITS
# More logits than this are computed in at least two chunks: XLA unrolls a loop of one iteration, and then keeps the
# logits of several passes at a time (four times the memory on CPU).
_FEW_LOGITS = 2**22


def token_logps(
    hidden: Float[Array, "*R T D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "*R T"],
    *,
    head_axes: Literal["dv", "vd"] = "dv",
    softcap: float | None = None,
    bias: Float[Array, " V"] | None = None,
    chunk_size: int | None = None,
    num_devices: int = 1,
    kept_logits: int = KEPT_LOGITS,
    constrain_head: Callable[[Array], Array] | None = None,
) -> Float[Array, "*R T"]:
    """Log-probability of each target, `log softmax(hidden @ head)[target]`, a chunk of tokens at a time.

    If all logits together are few, the backward pass uses those of the forward pass. Otherwise it recomputes them, and
    neither pass keeps an array of tokens by vocabulary. Matmuls accumulate in float32.

    Args:
      hidden: hidden states that predict the targets. With a leading rows axis, each row is split into chunks, so that
        devices that share the rows all work on every chunk.
      head: output projection. It is read in the dtype of `hidden`; its gradient is accumulated in float32 and returned
        in its own dtype.
      targets: token ids.
      head_axes: "vd" for a head stored as an embedding table. It is used as stored: transposing it before the loop over
        chunks would copy it.
      softcap: logits become `softcap · tanh(logits / softcap)`.
      bias: added to the logits.
      chunk_size: tokens (of all rows together) whose logits exist at a time; None chooses by the vocabulary and the
        number of devices.
      num_devices: devices over which a chunk's logits are sharded, by rows, by vocabulary or both. Each device reads
        its whole part of the head for every chunk, so chunks grow with the number of devices.
      kept_logits: the most logits per device that are kept for the backward pass; 0 recomputes them always.
      constrain_head: a sharding constraint for the head and its gradient, so that neither is resharded in every chunk;
        None leaves both to the compiler.

    Returns:
      Log-probabilities in nats, in at least float32.
    """
    if hidden.ndim == 2:
        return token_logps(
            hidden[None], head, targets[None],
            head_axes=head_axes, softcap=softcap, bias=bias, chunk_size=chunk_size, num_devices=num_devices,
            kept_logits=kept_logits, constrain_head=constrain_head,
        ).squeeze(0)  # fmt: skip
    num_rows, length, _ = hidden.shape
    vocabulary = head.shape[head_axes.index("v")]
    least_chunks = 1
    if chunk_size is None:
        chunk_size = max(_MAX_LOGITS * num_devices // vocabulary, 1)
        least_chunks += num_rows * length * vocabulary > _FEW_LOGITS * num_devices
    chunk = min(max(chunk_size // num_rows, 1), length)
    num_chunks = min(max(-(-length // chunk), least_chunks), length)
    chunk = -(-length // num_chunks)  # chunks of equal size leave the least padding
    padding = num_chunks * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    bias = jnp.zeros(vocabulary, jnp.promote_types(head.dtype, jnp.float32)) if bias is None else bias
    keeps_logits = targets.size * vocabulary <= kept_logits * num_devices
    constrain_head = constrain_head or (lambda head: head)
    return _chunked_logps(hidden, head, bias, targets, head_axes, softcap, num_chunks, keeps_logits, constrain_head)[
        :, :length
    ]


def _split(x: jax.Array, num_chunks: int) -> jax.Array:
    """[R, T, ...] -> [chunks, R, T / chunks, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """[chunks, R, t, ...] -> [R, chunks · t, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _product(subscripts: str, left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Full float32 matmuls for float32: GPU and TPU would use a narrower type by default.
    precision = None if left.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=dtype)


def _logits(hidden: jax.Array, head: jax.Array, bias: jax.Array, axes: str, softcap: float | None) -> jax.Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = _product(f"rtd,{axes}->rtv", hidden, head, dtype)
    logits = logits + bias.astype(dtype)[None, None]
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison, not a gather: it stays local if the vocabulary is sharded.
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _chunked_logps(hidden, head, bias, targets, axes, softcap, num_chunks, keeps_logits, constrain_head):
    del keeps_logits  # without a gradient, nothing is kept
    return _chunked_logps_forward(hidden, head, bias, targets, axes, softcap, num_chunks, False, constrain_head)[0]


def _chunked_logps_forward(hidden, head, bias, targets, axes, softcap, num_chunks, keeps_logits, constrain_head):
    # Cast here, not by the caller: JAX gives a gradient the dtype of the argument, and the head's must not be rounded.
    of_head, head = jnp.empty((0,), head.dtype), constrain_head(head.astype(hidden.dtype))

    def one_chunk(args):
        hidden_rtd, targets_rt = args
        logits = _logits(hidden_rtd, head, bias, axes, softcap)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.sum(jnp.where(_is_target(logits, targets_rt), logits, 0), axis=-1)
        return chosen - normalizer, normalizer, logits if keeps_logits else None

    logps, normalizer, kept = jax.lax.map(one_chunk, (_split(hidden, num_chunks), _split(targets, num_chunks)))
    return _join(logps), (hidden, head, bias, targets, _join(normalizer), kept, of_head)


def _chunked_logps_backward(
    axes, softcap, num_chunks, keeps_logits, constrain_head, residuals, cotangent
) -> tuple[Any, ...]:
    del keeps_logits
    hidden, head, bias, targets, normalizer, kept, of_head = residuals
    dtype = cotangent.dtype

    def one_chunk(carry, args):
        head_grad, bias_grad = carry
        hidden_rtd, targets_rt, normalizer_rt, cotangent_rt, logits = args
        if logits is None:
            logits = _logits(hidden_rtd, head, bias, axes, softcap)
        probabilities = jnp.exp(logits - normalizer_rt[..., None])
        logits_grad = cotangent_rt[..., None] * (_is_target(logits, targets_rt) - probabilities)
        if softcap is not None:
            logits_grad = logits_grad * (1 - jnp.square(logits / softcap))
        bias_grad = bias_grad + jnp.sum(logits_grad, axis=(0, 1))
        logits_grad = logits_grad.astype(hidden.dtype)
        hidden_grad = _product(f"rtv,{axes}->rtd", logits_grad, head, dtype)
        head_grad = head_grad + _product(f"rtd,rtv->{axes}", hidden_rtd, logits_grad, dtype)
        return (head_grad, bias_grad), hidden_grad.astype(hidden.dtype)

    # The sum over devices follows the loop: a gradient that is sharded inside would be summed in every chunk.
    carry = (constrain_head(jnp.zeros(head.shape, dtype)), jnp.zeros(bias.shape, dtype))
    parts = tuple(_split(x, num_chunks) for x in (hidden, targets, normalizer, cotangent))
    (head_grad, bias_grad), hidden_grad = jax.lax.scan(one_chunk, carry, (*parts, kept))
    return _join(hidden_grad), constrain_head(head_grad).astype(of_head.dtype), bias_grad.astype(bias.dtype), None


_chunked_logps.defvjp(_chunked_logps_forward, _chunked_logps_backward)


def segment_sums(
    values: Float[Array, " T"],
    segment_ids: Int[Array, " T"],
    num_examples: int,
    *,
    where: Bool[Array, " T"],
) -> Float[Array, " B"]:
    """Sums values over the examples of a packed row, in at least float32.

    Args:
      values: one per token.
      segment_ids: 0-based example of each token; those outside [0, num_examples) must be masked out by `where`.
      num_examples: number of examples in the result.
      where: which tokens count.

    Returns:
      One sum per example; 0 if it has no token.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    member = (segment_ids[None, :] == jnp.arange(num_examples)[:, None]) & where[None, :]
    return jnp.sum(jnp.where(member, values[None, :], 0), axis=1)
