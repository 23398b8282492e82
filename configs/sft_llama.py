"""Supervised fine-tuning of Llama-3.1-8B-Instruct: what the reference of the others is made by.

    python -m kto_jax.train --config=configs/sft_llama.py --config.data.train=demonstrations.jsonl --workdir=runs/sft

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, no reference is held: 128 GB
and activations, spread by fsdp over the chips of one host. demonstrations.jsonl holds rows of {"prompt": ...,
"completion": ...}.

Expect: the loss is in nats per token, the mean over completions of the mean over their tokens. Of thumbs or pairs
(data.format), the desirable ones are read; then eval_margin says how much likelier they became than the others.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "sft"
    config.data.train = "demonstrations.jsonl"
    config.data.format = "demonstrations"
    config.batch_size = 64
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.epochs = 2
    return config
