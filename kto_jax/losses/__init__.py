"""Losses: pure functions of arrays, one value per example out, the reduction left to the caller."""

from kto_jax.losses.halo import halo_loss
from kto_jax.losses.kto import kl_reference_point, kto_loss
from kto_jax.losses.logprobs import segment_sums, token_logps

__all__ = ["halo_loss", "kl_reference_point", "kto_loss", "segment_sums", "token_logps"]
