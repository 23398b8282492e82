"""APO-zero of Llama-3.1-8B-Instruct on thumbs: KTO with its reference point fixed at 0.

    python -m kto_jax.train --config=configs/apo_zero_unpaired_llama.py --config.data.train=feedback.jsonl

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 145 GB plus activations, sharded by fsdp over the chips of one host.
feedback.jsonl holds rows of {"prompt": ..., "completion": ..., "label": true or false}; pairs also work, one completion
at a time (data.format "pairs").

Expect: the loss starts at 0.5 and the margin at 0. Without the pass over unrelated completions a step costs two thirds
of KTO's. The KTO paper reports a lower GSM8K score without z0 (49.5 instead of 53.5).
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "apo_zero_unpaired"
    config.data.train = "feedback.jsonl"
    config.batch_size = 128
    config.objective.beta = 0.1
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 150
    return config
