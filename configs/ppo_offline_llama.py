"""Offline PPO of Llama-3.1-8B-Instruct on thumbs: ±1 rewards and a value head, arXiv 2402.01306, appendix B.

    python -m kto_jax.train --config=configs/ppo_offline_llama.py --config.data.train=feedback.jsonl

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, the reference 2 in bfloat16:
145 GB and activations, spread by fsdp over the chips of one host. feedback.jsonl holds rows of {"prompt": ...,
"completion": ..., "label": true or false}.

Expect: the value head starts at 0, so that the first advantages are the rewards themselves. Scores of a reward model
take the place of ±1 with --config.data.format=scores --config.objective.rewards=scores.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "ppo_offline"
    config.data.train = "feedback.jsonl"
    config.batch_size = 128
    config.objective.kl_weight = 0.1
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    return config
