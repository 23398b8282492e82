"""ORPO of Llama-3.1-8B-Instruct on pairs: fine-tuning and alignment in one, without a reference.

    python -m kto_jax.train --config=configs/orpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/orpo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ...,
"chosen": ..., "rejected": ...}; thumbs also make pairs, if a prompt has both labels (data.format "thumbs").

Expect: the loss starts at the likelihood loss of the chosen completions plus about odds_weight · ln 2, and most of its
decrease is that likelihood. The margin is the difference of the mean log-probabilities, times odds_weight.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "orpo"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.odds_weight = 0.1
    config.optimizer.learning_rate = 8e-6
    config.optimizer.warmup_steps = 150
    return config
