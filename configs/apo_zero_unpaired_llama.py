"""APO-zero of Llama-3.1-8B-Instruct on thumbs: KTO with its reference point held at 0.

    python -m kto_jax.train --config=configs/apo_zero_unpaired_llama.py --config.data.train=feedback.jsonl

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, the reference 2 in bfloat16:
145 GB and activations, spread by fsdp over the chips of one host. feedback.jsonl holds rows of {"prompt": ...,
"completion": ..., "label": true or false}; pairs are read too, one completion at a time (data.format "pairs").

Expect: the loss starts at 0.5 and the margin at 0. Without the pass over unrelated completions a step costs two
thirds of KTO's; the paper of KTO finds GSM8K lower without z0 (49.5 against 53.5).
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
