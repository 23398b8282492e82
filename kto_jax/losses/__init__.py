"""Losses: pure functions of arrays that return one value per example or token; the caller reduces."""

from kto_jax.losses.bco import bco_loss, update_running_mean
from kto_jax.losses.cpo import cpo_loss
from kto_jax.losses.dpo import DPO_VARIANTS, F_DIVERGENCES, check_dpo_options, dpo_loss
from kto_jax.losses.grpo import group_relative_advantages, grpo_loss, k3_kl, kl_estimate, leave_one_out_advantages
from kto_jax.losses.halo import halo_loss
from kto_jax.losses.kto import (
    apo_zero_unpaired_loss,
    humanline_clamp,
    kl_reference_point,
    kto_loss,
    log_utility_loss,
    opposite_class_reference_point,
)
from kto_jax.losses.logprobs import segment_sums, token_logps
from kto_jax.losses.orpo import orpo_loss
from kto_jax.losses.policy_gradient import clipped_tokens, policy_gradient_loss
from kto_jax.losses.ppo import generalized_advantages, ppo_clip_loss, ppo_value_loss
from kto_jax.losses.reward import bradley_terry_loss
from kto_jax.losses.router import balance_loss, z_loss
from kto_jax.losses.sft import mean_logps, sft_loss
from kto_jax.losses.simpo import simpo_loss
from kto_jax.losses.slic import slic_loss

__all__ = [
    "DPO_VARIANTS",
    "F_DIVERGENCES",
    "apo_zero_unpaired_loss",
    "balance_loss",
    "bco_loss",
    "bradley_terry_loss",
    "check_dpo_options",
    "clipped_tokens",
    "cpo_loss",
    "dpo_loss",
    "generalized_advantages",
    "group_relative_advantages",
    "grpo_loss",
    "halo_loss",
    "humanline_clamp",
    "k3_kl",
    "kl_estimate",
    "kl_reference_point",
    "kto_loss",
    "leave_one_out_advantages",
    "log_utility_loss",
    "mean_logps",
    "opposite_class_reference_point",
    "orpo_loss",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "ppo_value_loss",
    "segment_sums",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "token_logps",
    "update_running_mean",
    "z_loss",
]
