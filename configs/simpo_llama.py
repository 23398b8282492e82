"""SimPO of Llama-3.1-8B-Instruct on pairs: length-normalised rewards, without a reference.

    python -m kto_jax.train --config=configs/simpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/simpo

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, no reference is held: 128 GB
and activations, spread by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ..., "chosen": ...,
"rejected": ...}; thumbs make pairs too, where a prompt has both labels (data.format "thumbs").

Expect: the margin starts at what the model itself prefers, which may be negative. The learning rate decides: too high
a one writes endless or broken text while the margin still rises, so read the samples.
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
