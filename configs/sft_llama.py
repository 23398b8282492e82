"""Supervised fine-tuning of Llama-3.1-8B-Instruct: it makes the reference of the other objectives.

    python -m kto_jax.train --config=configs/sft_llama.py --config.data.train=demonstrations.jsonl --workdir=runs/sft

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. demonstrations.jsonl holds rows of {"prompt":
..., "completion": ...}.

Expect: the loss is in nats per token, the mean over completions of the mean over their tokens. With thumbs or pairs
(data.format), it trains on the desirable ones; eval_margin then says how much likelier they are than the others.
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
