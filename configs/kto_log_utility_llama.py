"""KTO's utility of a pair, inside a log-sigmoid, of Llama-3.1-8B-Instruct.

    python -m kto_jax.train --config=configs/kto_log_utility_llama.py --config.data.train=pairs.jsonl

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, the reference 2 in bfloat16:
145 GB and activations, spread by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ..., "chosen":
..., "rejected": ...}; thumbs make pairs too, where a prompt has both labels (data.format "thumbs").

Expect: the loss starts at −log σ(1) = 0.313 with weights of 1, and ends no lower than −log σ(2) = 0.127: it is
bounded on both sides, as KTO is. Plain KTO reads pairs too, one completion at a time: --config.objective.name=kto.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "kto_log_utility"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.beta = 0.1
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 150
    return config
