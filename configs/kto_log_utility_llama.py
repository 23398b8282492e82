"""KTO's utility of a pair, inside a log-sigmoid, of Llama-3.1-8B-Instruct.

    python -m kto_jax.train --config=configs/kto_log_utility_llama.py --config.data.train=pairs.jsonl

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 145 GB plus activations, sharded by fsdp over the chips of one host.
pairs.jsonl holds rows of {"prompt": ..., "chosen": ..., "rejected": ...}; thumbs also make pairs, if a prompt has both
labels (data.format "thumbs").

Expect: the loss starts at −log σ(1) = 0.313 with weights of 1, and ends no lower than −log σ(2) = 0.127: like KTO, it
is bounded on both sides. Plain KTO also reads pairs, one completion at a time: --config.objective.name=kto.
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
