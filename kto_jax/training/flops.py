"""Tokens and FLOPs of a step: the numerators of tokens per second and of MFU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kto_jax.models.model import Model
from kto_jax.objectives import Objective
from kto_jax.shapes import FeedbackBatch, PackedRows


def tokens_and_flops(model: Model, objective: Objective, batch: FeedbackBatch) -> dict[str, Float[Array, ""]]:
    """The tokens and FLOPs that a batch requires, whatever the implementation recomputes.

    Returns:
      tokens: real tokens of the matched rows. flops, at real tokens: the policy's forward and backward pass over the
      matched rows, and the forward passes of the reference (if the step reads it) and of the first pass. With adapters
      the backward pass computes no gradient of the frozen matrices; the adapters' own FLOPs are not counted. A value
      head's own trunk adds its forward and backward pass.
    """
    matched = _forward_flops(model, objective, batch.matched)
    unmatched = _forward_flops(model, objective, batch.unmatched)
    backward = (2 if model.lora is None else 1) * matched["products"] + 2 * matched["attention"]
    models = 2 if objective.uses_reference and batch.matched_reference is None else 1
    forward = matched["products"] + matched["attention"]
    first_pass = {
        "none": jnp.zeros_like(forward),
        "unmatched": unmatched["products"] + unmatched["attention"],
        "matched": forward,
    }[objective.first_pass]
    tower = 3 * (matched["body"] + matched["attention"]) if model.value_tower else 0
    return {"tokens": matched["tokens"], "flops": models * forward + backward + models * first_pass + tower}


def _forward_flops(model: Model, objective: Objective, rows: PackedRows) -> dict[str, jax.Array]:
    """Tokens, and the FLOPs of one forward pass: matmuls of the layers, those and the head's, and attention."""
    real = rows.segment_ids > 0
    tokens = jnp.sum(real).astype(jnp.float32)
    attended = jnp.where(real, rows.positions + 1, 0)
    completion_tokens = jnp.sum(rows.target_segments > 0).astype(jnp.float32)
    body = model.config.flops_per_token(attended=0, head=False)
    head = model.config.flops_per_token(attended=0, head=True) - body
    attention = (model.config.flops_per_token(attended=1, attended_locally=0, head=False) - body) * jnp.sum(
        attended.astype(jnp.float32)
    )
    if model.config.window is not None:
        local = model.config.flops_per_token(attended=0, attended_locally=1, head=False) - body
        attention += local * jnp.sum(jnp.minimum(attended, model.config.window).astype(jnp.float32))
    has_logits = objective.scalar_head != "reward"
    products = body * tokens + has_logits * head * completion_tokens
    return {"tokens": tokens, "body": body * tokens, "products": products, "attention": attention}
