"""CPO of Llama-3.1-8B-Instruct on pairs: DPO without a reference, plus a likelihood term.

    python -m kto_jax.train --config=configs/cpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/cpo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ...,
"chosen": ..., "rejected": ...}; thumbs also make pairs, if a prompt has both labels (data.format "thumbs").

Expect: the loss is the preference loss plus the likelihood loss of the chosen completions, a mean over tokens. The
margin grows with the length of completions, because their log-probabilities are sums.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "cpo"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.beta = 0.1
    config.objective.nll_weight = 1.0
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    return config
