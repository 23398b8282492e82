"""Offline PPO of Llama-3.1-8B-Instruct on thumbs: ±1 rewards and a value head, arXiv 2402.01306, appendix B.

    python -m kto_jax.train --config=configs/ppo_offline_llama.py --config.data.train=feedback.jsonl

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 145 GB plus activations, sharded by fsdp over the chips of one host.
feedback.jsonl holds rows of {"prompt": ..., "completion": ..., "label": true or false}.

Expect: the value head starts at 0, so the first advantages are the rewards themselves. To use scores of a reward model
instead of ±1, set --config.data.format=scores --config.objective.rewards=scores.
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
