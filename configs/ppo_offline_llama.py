"""Offline PPO of Llama-3.1-8B-Instruct on thumbs: ±1 rewards and a value head, arXiv 2402.01306, appendix B.

    python -m kto_jax.train --config=configs/ppo_offline_llama.py --config.data.train=feedback.jsonl

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, the reference 2 in bfloat16:
145 GB and activations, spread by fsdp over the chips of one host. feedback.jsonl holds rows of {"prompt": ...,
"completion": ..., "label": true or false}.

Expect: the value head starts at 0, so that the first advantages are the rewards themselves. Scores of a reward model
take the place of ±1 with --config.data.format=scores --config.objective.rewards=scores.
"""

from kto_jax.config import default_config


def get_config():
    config = default_config()
    config.objective.name = "ppo_offline"
    config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.train = "feedback.jsonl"
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.batch_size = 128
    config.microbatch_rows = 16
    config.objective.kl_weight = 0.1
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    return config
