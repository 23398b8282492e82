"""SLiC-HF of Llama-3.1-8B-Instruct on pairs: a hinge on likelihoods, without a reference.

    python -m kto_jax.train --config=configs/slic_llama.py --config.data.train=pairs.jsonl --workdir=runs/slic

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ...,
"chosen": ..., "rejected": ...}; thumbs also make pairs, if a prompt has both labels (data.format "thumbs").

Expect: the hinge of a pair is 0 once the chosen completion leads by `margin` nats, without further gradient: the loss
ends near nll_weight times the likelihood loss. The margin is in nats.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "slic"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.margin = 1.0
    config.objective.nll_weight = 0.1
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    return config
