"""SimPO of Llama-3.1-8B-Instruct on pairs: length-normalised rewards, without a reference.

    python -m kto_jax.train --config=configs/simpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/simpo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ...,
"chosen": ..., "rejected": ...}; thumbs also make pairs, if a prompt has both labels (data.format "thumbs").

Expect: the margin starts at the model's own preference, which may be negative. The learning rate is critical: if it is
too high, text becomes endless or broken while the margin still rises, so read the samples.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "simpo"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 128
    config.objective.beta = 2.5
    config.objective.margin = 1.0
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    return config
